"""What every call passes through: who calls, frames that don't parse, errors, and those who watch."""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from bilm_server.calls import TEST_MARK, CallObserver, CallRecord, entered
from bilm_server.errors import CallerGoneError, Reason, RefusalError, internal_error

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger("bilm_server.errors")

_STATUS_TIMEOUT_S = 1.0

Parse = Callable[[bytes], Any]
Behavior = Callable[..., Any]
Gate = Callable[[CallRecord, "Context"], AbstractContextManager[None]]
"""Finds out who calls, and holds what that caller may have of the server for as long as the call lasts.

Raises a RefusalError to whom it doesn't let in.
"""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of one service."""

    def __init__(self, service: str, gate: Gate, observers: Sequence[CallObserver]) -> None:
        """Keeps its arguments.

        Args:
            service: full name.
            gate: comes before a byte of the request is looked at.
            observers: see every call, in this order; each must neither raise nor take long.
        """
        self._prefix = f"/{service}/"
        self._gate, self._observers = gate, tuple(observers)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Part of grpc's interface."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        if not handler_call_details.method.startswith(self._prefix):
            return _foreign(handler)
        method = handler_call_details.method.removeprefix(self._prefix)
        parse, serializer = _parser(handler.request_deserializer), _passing_bytes(handler.response_serializer)
        # Without a deserialiser grpc hands over bytes. Left to it, a frame that doesn't parse would be answered with
        # UNKNOWN and protobuf's own text before any of our code sees the call.
        if handler.stream_stream is not None:
            behavior = self._guard(method, handler.stream_stream, lambda requests: _parsed(requests, parse))
            return grpc.stream_stream_rpc_method_handler(behavior, None, serializer)
        if handler.unary_unary is not None:
            behavior = self._guard(method, _from_stream(handler.unary_unary, parse), lambda requests: requests)
            return grpc.stream_unary_rpc_method_handler(behavior, None, serializer)
        return handler

    def _guard(self, method: str, behavior: Behavior, read: Callable[[Any], Any]) -> Behavior:
        """Runs a method so that every way to fail ends in a status, and every end is seen."""

        async def guarded(request: Any, context: "Context") -> Any:
            metadata = tuple(context.invocation_metadata() or ())
            call = CallRecord(method, context.peer(), metadata, is_test=any(key == TEST_MARK for key, _ in metadata))
            begun_s = time.monotonic()
            # Not when the method returns: grpc keeps an answer for as long as its caller reads none of it
            context.add_done_callback(lambda _: call.held.close())  # type: ignore[arg-type] # the stub has no protocol
            for observer in self._observers:
                observer.begin(call)
            with entered(call):
                try:
                    call.held.enter_context(self._gate(call, context))
                    response = await behavior(read(request), context)
                    call.code = grpc.StatusCode.OK
                    return response
                except RefusalError as error:
                    await _abort(call, context, error)
                except CallerGoneError:
                    call.code = _code_of_cancelled(context)
                except asyncio.CancelledError:
                    call.code = _code_of_cancelled(context)
                    raise
                except grpc.aio.BaseError as error:  # grpc goes on with this call no more: the server has stopped
                    _log.warning("%s was ended by grpc: %s", method, type(error).__name__)
                    call.code = grpc.StatusCode.UNAVAILABLE
                    raise asyncio.CancelledError from None
                except Exception:
                    _log.exception("%s failed", method)
                    await _abort(call, context, internal_error())
                finally:
                    call.duration_s = time.monotonic() - begun_s
                    for observer in self._observers:
                        observer.end(call)

        return guarded


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


def _foreign(handler: "grpc.RpcMethodHandler[Any, Any]") -> "grpc.RpcMethodHandler[Any, Any]":
    """A method of health or reflection: bad messages are refused there as here, and everything else is left alone."""
    parse, serializer = _parser(handler.request_deserializer), handler.response_serializer
    if handler.unary_unary is not None:
        behavior = _refusing(_from_stream(handler.unary_unary, parse))
        return grpc.stream_unary_rpc_method_handler(behavior, None, serializer)
    if handler.unary_stream is not None:
        behavior = _refusing(_from_stream(_written(handler.unary_stream), parse))
        return grpc.stream_stream_rpc_method_handler(behavior, None, serializer)
    if handler.stream_stream is not None:
        written = _written(handler.stream_stream)
        behavior = _refusing(lambda requests, context: written(_parsed(requests, parse), context))
        return grpc.stream_stream_rpc_method_handler(behavior, None, serializer)
    return handler


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


def _refusing(behavior: Behavior) -> Behavior:
    async def refusing(requests: AsyncIterator[bytes], context: "Context") -> Any:
        try:
            return await behavior(requests, context)
        except RefusalError as error:
            await _send_status(context, error)

    return refusing


def _code_of_cancelled(context: "Context") -> grpc.StatusCode:
    """What the caller saw: grpc cancels a method at its deadline, too."""
    remaining_s = context.time_remaining()
    late = remaining_s is not None and remaining_s <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


async def _abort(call: CallRecord, context: "Context", refusal: RefusalError) -> None:
    call.code, call.reason = refusal.code, refusal.reason.value
    await _send_status(context, refusal)


async def _send_status(context: "Context", refusal: RefusalError) -> None:
    """Ends a call, but doesn't wait for a caller who reads nothing: grpc has the status, and sends it if they do."""
    try:
        async with asyncio.timeout(_STATUS_TIMEOUT_S):
            await context.abort(refusal.code, str(refusal), refusal.trailing_metadata())
    except (TimeoutError, grpc.aio.InternalError):  # … or the caller has left meanwhile
        raise asyncio.CancelledError from None  # the way to end a method of which grpc doesn't complain in the log


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
