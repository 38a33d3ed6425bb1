"""What every call passes through: who calls, frames that don't parse, errors, and those who watch.

Every method of every service is guarded, those that don't exist included, unless its service is open: health, and
reflection where it is on.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import Reason
from google.protobuf.message import DecodeError

from bilm_server.calls import UNKNOWN_METHOD, CallObserver, CallRecord, caller_request_id, entered
from bilm_server.errors import CallerGoneError, RefusalError, internal_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

_log = logging.getLogger("bilm_server.errors")

_STATUS_TIMEOUT_S = 1.0

Parse = Callable[[bytes], Any]
Behavior = Callable[..., Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]
Gate = Callable[[CallRecord, "Context"], AbstractContextManager[None]]
"""Finds out who calls, and holds what that caller may have of the server for as long as the call lasts.

Raises a RefusalError to whom it doesn't let in.
"""


class OpenCalls:
    """The calls of open services: some last for as long as their caller likes, and none may hold a drain."""

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
    """Lets anybody call some services, and nobody any other; no input of a caller is an error in the log."""

    def __init__(self, open_services: Collection[str], calls: OpenCalls | None = None) -> None:
        """Keep what calls pass through.

        Args:
            open_services: full names.
            calls: where the calls that run are found; None: nowhere.
        """
        self._open_services = frozenset(open_services)
        self._calls = calls or OpenCalls()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Part of grpc's interface; None: UNIMPLEMENTED, by grpc."""
        service, method = _service_and_method(handler_call_details)
        handler = await continuation(handler_call_details)
        if handler is None or service not in self._open_services:
            return None
        return _method_handler(_quiet(method, _from_bytes(handler), self._calls), handler)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Guards every method but those of open services."""

    def __init__(
        self,
        service: str,
        gate: Gate,
        observers: Sequence[CallObserver],
        open_services: Collection[str] = (),
        open_calls: OpenCalls | None = None,
    ) -> None:
        """Keep what calls pass through.

        Args:
            service: full name of the one whose methods are named without it; any other method has its full name.
            gate: comes before a byte of the request is looked at.
            observers: see every guarded call, in this order; each must neither raise nor take long.
            open_services: full names of those that pass neither gate nor observers.
            open_calls: where the calls of those that run are found; None: nowhere.
        """
        self._service, self._gate, self._observers = service, gate, tuple(observers)
        self._open_services = frozenset(open_services)
        self._open = OpenInterceptor(open_services, open_calls)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Part of grpc's interface."""
        service, method = _service_and_method(handler_call_details)
        if service in self._open_services:
            return await self._open.intercept_service(continuation, handler_call_details)
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._guarded(UNKNOWN_METHOD, _unknown))
        name = method if service == self._service else f"{service}/{method}"
        serializer = _passing_bytes(handler.response_serializer)
        return _method_handler(self._guarded(name, _from_bytes(handler)), handler, serializer)

    def _guarded(self, method: str, behavior: Behavior) -> Behavior:
        """Run a method so that every way to fail ends in a status, and every end is seen."""

        async def guarded(requests: AsyncIterator[bytes], context: "Context") -> Any:
            metadata = tuple(context.invocation_metadata() or ())
            call = CallRecord(method, context.peer(), metadata, caller_request_id(metadata))
            # Not when the method returns: grpc keeps an answer for as long as its caller reads none of it
            context.add_done_callback(lambda _: call.held.close())  # type: ignore[arg-type] # the stub has no protocol
            with self._observed(call), entered(call):
                try:
                    call.held.enter_context(self._gate(call, context))
                    response = await behavior(requests, context)
                    set_code: grpc.StatusCode | None = context.code()
                    call.code = set_code or grpc.StatusCode.OK
                    return response
                except Exception as error:
                    await _end(call, context, error)
                except asyncio.CancelledError:
                    call.code = _code_of_cancelled(context)
                    raise

        return guarded

    @contextmanager
    def _observed(self, call: CallRecord) -> "Iterator[None]":
        begun_s = time.monotonic()
        for observer in self._observers:
            observer.begin(call)
        try:
            yield
        finally:
            call.duration_s = time.monotonic() - begun_s
            for observer in self._observers:
                observer.end(call)


async def _end(call: CallRecord, context: "Context", error: Exception) -> None:
    """End a call whose method has raised."""
    match error:
        case grpc.aio.AbortError():  # of a method that has sent its status itself
            call.code = context.code()
            raise error
        case grpc.aio.BaseError():  # grpc continues with this call no more: the server has stopped
            _log.warning("%s was ended by grpc: %s", call.method, type(error).__name__)
            call.code = grpc.StatusCode.UNAVAILABLE
            raise asyncio.CancelledError from None
        case CallerGoneError():
            call.code = _code_of_cancelled(context)
        case RefusalError():
            await _refuse(call, context, error)
        case NotImplementedError():  # what generated code raises for a method that its service lacks
            await _refuse(call, context, _unknown_method())
        case _:
            _log.error("%s failed", call.method, exc_info=error)
            await _refuse(call, context, internal_error())


def _quiet(method: str, behavior: Behavior, calls: OpenCalls) -> Behavior:
    """Run a method that anybody may call: no failure is an error in the log, as each could be a caller's doing."""

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


# ---- methods ----


def _service_and_method(details: grpc.HandlerCallDetails) -> tuple[str, str]:
    service, _, method = details.method.removeprefix("/").rpartition("/")
    return service, method


def _method_handler(
    behavior: Behavior, handler: "Handler", serializer: Callable[[Any], bytes] | None = None
) -> "Handler":
    """Return a handler that gives `behavior` an iterator of bytes, and responds as `handler` does.

    Without a deserialiser grpc hands over bytes. Left to it, a frame that doesn't parse would be answered with UNKNOWN
    and protobuf's own text before any of our code sees the call.
    """
    kind = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return kind(behavior, None, serializer or handler.response_serializer)


def _from_bytes(handler: "Handler") -> Behavior:
    """Return the method of a handler of any kind, fed from a stream of bytes, writing what it yields."""
    parse = _parser(handler.request_deserializer)
    methods: tuple[Behavior | None, ...] = (
        handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream
    )  # fmt: skip
    method = _written(next(filter(None, methods)))
    if handler.request_streaming:
        return lambda requests, context: method(_parsed(requests, parse), context)
    return _from_stream(method, parse)


def _from_stream(behavior: Behavior, parse: Parse) -> Behavior:
    """A unary method, fed from a stream of one message.

    grpc.aio leaves a unary call that ends before its message is whole without any status, for ever.
    """

    async def fed(requests: AsyncIterator[bytes], context: "Context") -> Any:
        data = await anext(requests, None)
        if data is None:
            raise RefusalError(Reason.MALFORMED_REQUEST, "the call ended before a whole message came")
        return await behavior(parse(data), context)

    return fed


def _written(behavior: Behavior) -> Behavior:
    """Return a method that writes its responses, also of one that yields them."""

    async def written(request: Any, context: "Context") -> Any:
        responses = behavior(request, context)
        if inspect.isawaitable(responses):
            return await responses
        async with aclosing(responses):
            async for response in responses:
                await context.write(response)
        return None

    return written


async def _unknown(requests: AsyncIterator[bytes], context: "Context") -> None:
    raise _unknown_method()


def _unknown_method() -> RefusalError:
    return RefusalError(Reason.METHOD_NOT_FOUND, "this server has no such method")


# ---- ends ----


def _code_of_cancelled(context: "Context") -> grpc.StatusCode:
    """What the caller saw: grpc cancels a method at its deadline, too."""
    remaining_s = context.time_remaining()
    late = remaining_s is not None and remaining_s <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


async def _refuse(call: CallRecord, context: "Context", refusal: RefusalError) -> None:
    call.code, call.reason = refusal.code, refusal.reason.value
    await _send_status(context, refusal, call.request_id)


async def _send_status(context: "Context", refusal: RefusalError, request_id: str) -> None:
    """End a call, but don't wait for a caller who reads nothing: grpc has the status, and sends it if they do."""
    try:
        async with asyncio.timeout(_STATUS_TIMEOUT_S):
            await context.abort(refusal.code, str(refusal), refusal.trailing_metadata(request_id))
    except (TimeoutError, grpc.aio.InternalError):  # … or the caller has left meanwhile
        raise asyncio.CancelledError from None  # the way to end a method of which grpc doesn't complain in the log


# ---- messages ----


def _parser(deserializer: Parse | None) -> Parse:
    def parse(data: bytes) -> Any:
        try:
            return deserializer(data) if deserializer else data
        except DecodeError:
            raise RefusalError(Reason.MALFORMED_REQUEST, "the message doesn't parse (strings must be UTF-8)") from None

    return parse


async def _parsed(requests: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
    async for request in requests:
        yield parse(request)


def _passing_bytes(serializer: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """Large responses are serialised off the event loop before they get here."""
    if serializer is None:
        return None
    return lambda response: response if isinstance(response, bytes) else serializer(response)
