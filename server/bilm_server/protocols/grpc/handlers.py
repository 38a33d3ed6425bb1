"""Methods as gRPC calls them: handlers take streams of bytes, so that no frame is parsed before its call is let in."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import Reason
from google.protobuf.message import DecodeError

from bilm_server.errors import RefusalError
from bilm_server.inference.types import NO_DEADLINE_S, Call
from bilm_server.observability.call_record import request_arrived

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

_WRITE_TIMEOUT_S = 1.0

Parse = Callable[[bytes], Any]
Behavior = Callable[..., Any]


def new_call(context: "Context", timeout_s: float = NO_DEADLINE_S) -> Call:
    """Return the call that a context belongs to, with its deadline or an earlier one."""
    remaining_s = context.time_remaining()
    return Call(time.monotonic() + min(timeout_s, NO_DEADLINE_S if remaining_s is None else remaining_s))


def method_handler(
    behavior: Behavior, handler: "Handler", serializer: Callable[[Any], bytes] | None = None
) -> "Handler":
    """Return a handler that gives `behavior` an iterator of bytes, and responds as `handler` does.

    Without a deserialiser grpc hands over bytes. Left to it, a frame that doesn't parse would be answered with UNKNOWN
    and protobuf's own text before any of our code sees the call.
    """
    kind = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return kind(behavior, None, serializer or handler.response_serializer)


def from_bytes(handler: "Handler") -> Behavior:
    """Return the method of a handler of any kind, fed from a stream of bytes, that writes what it yields."""
    parse = _parser_of(handler.request_deserializer)
    methods: tuple[Behavior | None, ...] = (
        handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream
    )  # fmt: skip
    method = _writing(next(filter(None, methods)))
    if handler.request_streaming:
        return lambda requests, context: method(_parsed(requests, parse), context)
    return _from_stream(method, parse)


def _from_stream(behavior: Behavior, parse: Parse) -> Behavior:
    """Return a unary method as one that is fed from a stream of one message.

    grpc.aio leaves a unary call that ends before its message is whole without any status, for ever. The message is read
    from the context: an iterator that isn't read to its end costs a task to close it.
    """

    async def fed(_: AsyncIterator[bytes], context: "Context") -> Any:
        data = await context.read()
        if data is grpc.aio.EOF:
            raise RefusalError(Reason.MALFORMED_REQUEST, "the call ended before a whole message came")
        request_arrived(len(data))
        return await behavior(parse(data), context)

    return fed


def _writing(behavior: Behavior) -> Behavior:
    """Return a method that writes its responses, also of one that yields them."""
    if inspect.iscoroutinefunction(behavior):
        return behavior

    async def written(request: Any, context: "Context") -> Any:
        responses = behavior(request, context)
        if inspect.isawaitable(responses):
            return await responses
        async with aclosing(responses):
            async for response in responses:
                await _write(context, response)
        return None

    return written


async def _write(context: "Context", response: Any) -> None:
    """Write a response; cancelled, end when it is written, or after a second if its client reads nothing.

    grpc.aio can't send a status behind a message that it is still writing: the call would end without any.
    """
    writing = asyncio.ensure_future(context.write(response))
    writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs what isn't awaited
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing], timeout=_WRITE_TIMEOUT_S)
        raise


def _parser_of(deserializer: Parse | None) -> Parse:
    def parse(data: bytes) -> Any:
        try:
            return deserializer(data) if deserializer else data
        except DecodeError:
            raise RefusalError(Reason.MALFORMED_REQUEST, "the message doesn't parse (strings must be UTF-8)") from None

    return parse


async def _parsed(requests: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
    async for request in requests:
        yield parse(request)


def passing_bytes(serializer: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """Return a serialiser that leaves bytes as they are: large responses are serialised off the event loop."""
    if serializer is None:
        return None
    return lambda response: response if isinstance(response, bytes) else serializer(response)
