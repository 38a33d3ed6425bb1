"""The body of a request: JSON of a bounded size, whole within a bounded time."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from bilm_api.constants import MAX_REQUEST_BYTES, Reason

from bilm_server.embedding.admission import pushback_ms
from bilm_server.errors import CallerGoneError
from bilm_server.protocols.http.messages import JSON, HttpRefusalError

MAX_ARRIVING_BYTES: Final = 64 * 2**20
"""Of all bodies that are being received; their callers are known by then."""
_MAX_DISCARDED_BYTES = 4 * MAX_REQUEST_BYTES

Receive = Callable[[], Awaitable[Any]]


class Bodies:
    """Receives bodies; used from the event loop only."""

    def __init__(self, max_arriving_bytes: int = MAX_ARRIVING_BYTES) -> None:
        """Set the bound of what all bodies that are being received have together."""
        self._max_arriving_bytes = max_arriving_bytes
        self._arriving_bytes = 0

    async def receive(self, headers: Mapping[str, str], receive: Receive, deadline_s: float) -> bytes:
        """Return a request's body.

        Args:
            headers: of the request.
            receive: ASGI's.
            deadline_s: when it must be whole, on the loop's clock.

        Raises:
            HttpRefusalError: it isn't JSON, too large or too slow, or too much arrives at a time.
            CallerGoneError: the client has left.
        """
        _check_type(headers.get("content-type", ""))
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HttpRefusalError("content-encoding: expected none", status=415)
        if _length(headers) > MAX_REQUEST_BYTES:
            raise _too_large(headers)
        parts: list[bytes] = []
        n_bytes = 0
        try:
            async with asyncio.timeout_at(deadline_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise CallerGoneError
                    part = message["body"]
                    n_bytes += len(part)
                    self._arriving_bytes += len(part)
                    parts.append(part)
                    if n_bytes > MAX_REQUEST_BYTES:
                        raise _too_large(headers)
                    if not message["more_body"]:
                        return b"".join(parts)
                    if self._arriving_bytes > self._max_arriving_bytes:
                        raise HttpRefusalError(
                            "too many requests arrive at a time; try again",
                            reason=Reason.OVERLOADED,
                            retry_after_ms=pushback_ms(1.0),
                            headers=_CLOSE,
                        )
        except TimeoutError:
            raise HttpRefusalError("the request took too long to arrive", status=408, headers=_CLOSE) from None
        finally:
            self._arriving_bytes -= n_bytes


_CLOSE: Final = {"connection": "close"}


def _check_type(value: str) -> None:
    media_type, _, parameters = value.partition(";")
    charset = parameters.strip().lower()
    if media_type.strip().lower() != JSON or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise HttpRefusalError(f"content-type: expected {JSON} in UTF-8", status=415)


def _length(headers: Mapping[str, str]) -> int:
    with suppress(KeyError, ValueError):
        return int(headers["content-length"])
    return 0


def _too_large(headers: Mapping[str, str]) -> HttpRefusalError:
    """Return the refusal; a body that isn't much too large is read and dropped, so its client sees the response."""
    closes = not 0 < _length(headers) <= _MAX_DISCARDED_BYTES
    message = f"the body has more than {MAX_REQUEST_BYTES} bytes"
    return HttpRefusalError(message, status=413, headers=_CLOSE if closes else {})
