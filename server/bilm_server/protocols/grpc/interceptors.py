"""What every gRPC call passes through: the gate, frames that don't parse, errors.

Every method of every service is guarded, those that don't exist included, unless it is open: all of health, of
reflection where it is on, and single methods of other protocols that report health, too.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import Reason

from bilm_server.embedding.call_gate import CallGate
from bilm_server.errors import CallerGoneError, Code, RefusalError, internal_error
from bilm_server.observability.call_record import UNKNOWN_METHOD, CallRecord, caller_request_id
from bilm_server.protocols.grpc.handlers import Behavior, from_bytes, method_handler, passing_bytes
from bilm_server.protocols.grpc.late_service import LOADING
from bilm_server.protocols.grpc.load_report import Trailer
from bilm_server.protocols.grpc.status import STATUS_CODES, trailing_metadata

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

_log = logging.getLogger(__name__)

_STATUS_TIMEOUT_S = 1.0
_DEADLINE_SLACK_S = 0.02
"""A client ends a call by its own clock, which has counted since before the call was sent."""

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]


class OpenCalls:
    """The calls of open methods: some last for as long as their caller likes, and none may hold a drain."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()

    def end(self) -> None:
        """End all that run."""
        for call in self._running:
            call.reschedule(asyncio.get_running_loop().time())

    async def run(self, response: Awaitable[Any]) -> Any:
        """Await the response of one.

        Raises:
            RefusalError: SHUTTING_DOWN, if `end` comes first.
        """
        try:
            async with asyncio.timeout(None) as call:
                self._running.add(call)
                try:
                    return await response
                finally:
                    self._running.discard(call)
        except TimeoutError:
            if not call.expired():
                raise
            raise RefusalError(Reason.SHUTTING_DOWN, "the server is shutting down") from None


class OpenInterceptor(grpc.aio.ServerInterceptor):
    """Lets every client call some methods and none of the others; no input of a client is an error in the log."""

    def __init__(self, open_names: Collection[str], calls: OpenCalls | None = None) -> None:
        """Keep what calls pass through.

        Args:
            open_names: full names of services, or of single methods, as in package.Service/Method.
            calls: where the calls that run are found; None: nowhere.
        """
        self._open_names = frozenset(open_names)
        self._calls = calls or OpenCalls()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Part of grpc's interface; None: UNIMPLEMENTED, by grpc."""
        service, method = _service_and_method(handler_call_details)
        handler = await continuation(handler_call_details)
        if handler is None or not self.is_open(service, method):
            return None
        return method_handler(_quiet(method, from_bytes(handler), self._calls), handler)

    def is_open(self, service: str, method: str) -> bool:
        """Return whether every client may call a method."""
        if "/" in service:  # the name of an open method, with a further part behind it
            return False
        return service in self._open_names or f"{service}/{method}" in self._open_names


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Guards every method but the open ones."""

    def __init__(
        self,
        service: str,
        gate: CallGate,
        open_names: Collection[str] = (),
        open_calls: OpenCalls | None = None,
        trailer: Callable[[], Trailer] | None = None,
    ) -> None:
        """Keep what calls pass through.

        Args:
            service: full name of the one whose methods are named without it; any other method has its full name.
            gate: comes before a byte of the request is looked at.
            open_names: full names of services and of single methods, package.Service/Method, that don't pass the gate.
            open_calls: where the calls of those that run are found; None: nowhere.
            trailer: trailing metadata of each call that succeeds; None: there is none.
        """
        self._service, self._gate, self._trailer = service, gate, trailer
        self._open = OpenInterceptor(open_names, open_calls)
        self._handlers: dict[str, Handler] = {}
        self._missing: Handler = grpc.stream_stream_rpc_method_handler(self._guarded(UNKNOWN_METHOD, _unknown))

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Part of grpc's interface."""
        known = self._handlers.get(handler_call_details.method)
        if known is not None:
            return known
        service, method = _service_and_method(handler_call_details)
        if self._open.is_open(service, method):
            return await self._open.intercept_service(continuation, handler_call_details)
        handler = await continuation(handler_call_details)
        if handler is None:
            return self._missing
        found = self._guard(service, method, handler)
        if handler is not LOADING:  # its place is taken when the model is loaded
            # Methods that exist alone: the others' names are callers' texts
            self._handlers[handler_call_details.method] = found
        return found

    def _guard(self, service: str, method: str, handler: "Handler") -> "Handler":
        name = method if service == self._service else f"{service}/{method}"
        serializer = passing_bytes(handler.response_serializer)
        return method_handler(self._guarded(name, from_bytes(handler)), handler, serializer)

    def _guarded(self, method: str, behavior: Behavior) -> Behavior:
        """Run a method so that every way to fail ends in a status, and every end is observed."""

        async def guarded(requests: AsyncIterator[bytes], context: "Context") -> Any:
            metadata = tuple(context.invocation_metadata() or ())
            call = CallRecord(method, context.peer(), metadata, caller_request_id(metadata))
            # Not when the method returns: grpc keeps a response for as long as its client reads none of it
            context.add_done_callback(lambda _: call.held.close())  # type: ignore[arg-type] # the stub has no protocol
            try:
                with self._gate.call(call, context.auth_context(), keeps_held=True):
                    response = await _run(call, behavior(requests, context), context)
                    if self._trailer is not None:
                        context.set_trailing_metadata(self._trailer())
                    return response
            except RefusalError as refusal:
                await _send_status(context, refusal, call.request_id)

        return guarded


async def _run(call: CallRecord, response: Awaitable[Any], context: "Context") -> Any:
    """Await a guarded method's response; what the method raises becomes a RefusalError, or has its code in the record.

    A method whose call is over ends with CancelledError: grpc logs all else.
    """
    try:
        found = await response
        call.code = _code_of(context)
    except grpc.aio.AbortError:  # of a method that has sent its status itself
        call.code = _code_of(context)
        raise
    except grpc.aio.BaseError as error:  # grpc has ended this call: the server has stopped
        _log.warning("%s was ended by grpc: %s", call.method, type(error).__name__)
        call.code = Code.UNAVAILABLE
        raise asyncio.CancelledError from None
    except CallerGoneError:
        call.code = _code_of_cancelled(context)
        return None
    except asyncio.CancelledError:
        call.code = _code_of_cancelled(context)
        raise
    except RefusalError:
        raise
    except NotImplementedError:  # what generated code raises for a method that its service lacks
        raise _unknown_method() from None
    except Exception as error:
        _log.error("%s failed", call.method, exc_info=error)
        raise internal_error() from error
    return found


def _quiet(method: str, behavior: Behavior, calls: OpenCalls) -> Behavior:
    """Run a method that every client may call: no failure is an error in the log, as a client could cause each."""

    async def quiet(requests: AsyncIterator[bytes], context: "Context") -> Any:
        try:
            return await calls.run(behavior(requests, context))
        except grpc.aio.AbortError:
            raise
        except grpc.aio.BaseError:  # the call is over, or the server has stopped
            raise asyncio.CancelledError from None
        except RefusalError as error:
            refusal = error
        except NotImplementedError:
            refusal = _unknown_method()
        except Exception as error:  # its type alone is logged: its text may be a caller's
            _log.warning("%s failed: %s", method, type(error).__name__)
            refusal = internal_error()
        await _send_status(context, refusal, caller_request_id(tuple(context.invocation_metadata() or ())))
        return None

    return quiet


def _service_and_method(details: grpc.HandlerCallDetails) -> tuple[str, str]:
    service, _, method = details.method.removeprefix("/").rpartition("/")
    return service, method


# ---- ends ----


async def _unknown(requests: AsyncIterator[bytes], context: "Context") -> None:
    raise _unknown_method()


def _unknown_method() -> RefusalError:
    return RefusalError(Reason.METHOD_NOT_FOUND, "this server has no such method")


def _code_of(context: "Context") -> Code:
    """Return the code that a method has set; OK if it has set none."""
    found: grpc.StatusCode | None = context.code()
    return Code.OK if found is None else Code[found.name]


def _code_of_cancelled(context: "Context") -> Code:
    """Return what the client saw: grpc cancels a method at its deadline, too."""
    remaining_s = context.time_remaining()
    late = remaining_s is not None and remaining_s <= _DEADLINE_SLACK_S
    return Code.DEADLINE_EXCEEDED if late else Code.CANCELLED


async def _send_status(context: "Context", refusal: RefusalError, request_id: str) -> None:
    """End a call without waiting for a client that reads nothing: grpc sends it the status if it does read."""
    try:
        async with asyncio.timeout(_STATUS_TIMEOUT_S):
            await context.abort(STATUS_CODES[refusal.code], str(refusal), trailing_metadata(refusal, request_id))
    except (TimeoutError, grpc.aio.InternalError):  # … or the client has left meanwhile
        raise asyncio.CancelledError from None  # the way to end a method of which grpc doesn't complain in the log
