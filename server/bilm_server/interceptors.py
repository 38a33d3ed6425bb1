"""What every call passes through: frames that don't parse, errors, the access log."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from bilm_server.errors import CallerGoneError, Reason, RefusalError, internal_error

_log = logging.getLogger("bilm_server.errors")
_access_log = logging.getLogger("bilm_server.access")

Deserializer = Callable[[bytes], Any]
Behavior = Callable[..., Any]


@dataclass(frozen=True)
class _Malformed:
    """Stands for a message that doesn't parse.

    Left to itself, grpc would answer UNKNOWN with protobuf's own text before any of our code sees the call.
    """


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of one service."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Part of grpc's interface."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        method = handler_call_details.method.removeprefix(self._prefix)
        deserializer, serializer = _lenient(handler.request_deserializer), _passing_bytes(handler.response_serializer)
        if handler.stream_stream is not None:
            behavior = _guard(method, handler.stream_stream, _checked_stream)
            return grpc.stream_stream_rpc_method_handler(behavior, deserializer, serializer)
        if handler.unary_unary is not None:
            behavior = _guard(method, handler.unary_unary, _checked)
            return grpc.unary_unary_rpc_method_handler(behavior, deserializer, serializer)
        return handler


def _guard(method: str, behavior: Behavior, check: Callable[[Any], Any]) -> Behavior:
    """Runs a method so that every way to fail ends in a status and a line in the log."""

    async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        begun_s, code = time.monotonic(), grpc.StatusCode.OK
        try:
            return await behavior(check(request), context)
        except RefusalError as error:
            code = error.code
            await context.abort(code, str(error), error.trailing_metadata())
        except CallerGoneError:
            code = grpc.StatusCode.CANCELLED
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            _log.exception("%s failed", method)
            code = grpc.StatusCode.INTERNAL
            refusal = internal_error()
            await context.abort(code, str(refusal), refusal.trailing_metadata())
        finally:
            _access_log.info("%s %s %.1f ms %s", method, code.name, 1e3 * (time.monotonic() - begun_s), context.peer())

    return guarded


def _lenient(deserializer: Deserializer | None) -> Deserializer | None:
    if deserializer is None:
        return None

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return _Malformed()

    return deserialize


def _passing_bytes(serializer: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """Large responses are serialised off the event loop before they get here."""
    if serializer is None:
        return None
    return lambda response: response if isinstance(response, bytes) else serializer(response)


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise RefusalError(Reason.MALFORMED_REQUEST, "the message doesn't parse (strings must be UTF-8)")
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
