"""One HTTP/1.1 connection: uvicorn's protocol on h11, bounded in time and in what it keeps."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from bilm_server.embedding.call_gate import NO_AUTH_CONTEXT
from bilm_server.security.auth import AuthContext

MAX_HEAD_BYTES: Final = 16 * 1024
"""Of a request's line and headers together."""
KEEP_ALIVE_S: Final = 75
"""Seconds that a connection may be idle between two requests; longer than what balancers keep theirs, 60 s mostly."""
_ABORT_DELAY_S = 1.0
_STATE_KEY = "connection"


def new_config(app: Callable[..., Any]) -> uvicorn.Config:
    """Return what uvicorn's protocol asks of a configuration; uvicorn writes no line but errors of its own."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        reset_contextvars=True,
    )


class Connection(H11Protocol):
    """A connection; it cancels the running call when its client leaves.

    Attributes:
        peer: the client, as grpc would name it.
        auth_context: what its certificate proves, as grpc's `auth_context` has it.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        peer: tuple[Any, ...],
        on_lost: Callable[["Connection"], None],
        request_timeout_s: float,
    ) -> None:
        """Keep what a connection needs.

        Args:
            config: of `new_config`.
            state: has all connections and calls.
            peer: address of the client, of which the transport has none when the client has left already.
            on_lost: takes the connection when it has ended, if it was ever made.
            request_timeout_s: from the first byte of a request to its last.
        """
        super().__init__(config, state, {_STATE_KEY: self})
        self._on_lost, self._request_timeout_s = on_lost, request_timeout_s
        self._late: asyncio.TimerHandle | None = None
        self._arriving = False  # a part of a request has come, and not yet all of it
        self._call: asyncio.Task[Any] | None = None
        self.request_deadline_s = 0.0
        """When the latest request must be whole, on the loop's clock."""
        self.made = self.lost = False
        self.peer = _peer(peer)
        self.auth_context: AuthContext = NO_AUTH_CONTEXT

    # ---- uvicorn's and asyncio's interface ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        # So that `flushed` means that the kernel has nearly everything; 0 would pause a TLS transport for ever
        transport.set_write_buffer_limits(high=1, low=0)
        self.made = True
        self.auth_context = _auth_context(transport.get_extra_info("peercert"))
        self._restart_timer()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        state, cycle = self.conn.their_state, self.cycle
        super().data_received(data)
        has_ended = state is h11.SEND_BODY and (self.conn.their_state is not state or self.cycle is not cycle)
        self._time_request(begins=has_ended or not self._arriving)

    def on_response_complete(self) -> None:
        """Turn to what has come behind the request, if anything has."""
        super().on_response_complete()
        self._time_request(begins=not self._arriving)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the call that runs."""
        super().connection_lost(exc)
        self.lost = True
        self._end_timer()
        self._unset_keepalive_if_required()
        self.app_state = {}
        if self._call is not None:
            self._call.cancel()
        self._on_lost(self)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, whether or not its client has read everything."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(_ABORT_DELAY_S, self.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that aren't a request; a refusal that comes amid a response only closes."""
        with suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
            self._leave_call()  # its body was cut: it is answered, and must not be again
        self.loop.call_later(_ABORT_DELAY_S, self.abort)

    def shutdown(self) -> None:
        """Close it, at once if no call runs, else behind the response."""
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # it is about to be closed for another cause
            self.transport.close()

    # ---- for the calls ----

    def run(self, call: "asyncio.Task[Any] | None") -> None:
        """Take the call that ends with the connection; None: it has ended by itself."""
        self._call = call

    async def flushed(self) -> None:
        """Return when everything that was written has gone to the kernel."""
        await self.flow.drain()

    def abort(self) -> None:
        """End it at once, whatever is unsent."""
        self._leave_call()
        self.transport.abort()

    def _leave_call(self) -> None:
        """Have the running call send nothing more, and uvicorn expect nothing."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _time_request(self, *, begins: bool) -> None:
        """Have the timer run exactly while a request is partial.

        Args:
            begins: whether what has come last is of another request than what the timer runs for.
        """
        state = self.conn.their_state
        self._arriving = state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))
        if begins:
            self._restart_timer()
        if not self._arriving:
            self._end_timer()

    def _restart_timer(self) -> None:
        self._end_timer()
        self.request_deadline_s = self.loop.time() + self._request_timeout_s
        # Somewhat later than the deadline: a call that reads its body has a response for that
        self._late = self.loop.call_at(self.request_deadline_s + _ABORT_DELAY_S, self.abort)

    def _end_timer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def connection_of(scope: Mapping[str, Any]) -> Connection:
    """Return the connection that a request came on."""
    found: Connection = scope["state"][_STATE_KEY]
    return found


def _peer(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"ipv6:{quote(f'[{host}]')}:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _auth_context(certificate: Mapping[str, Any] | None) -> AuthContext:
    """Return what Python's ssl knows of a certificate that was verified, by grpc's names."""
    if not certificate:
        return NO_AUTH_CONTEXT
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    return {
        "x509_common_name": [value.encode() for name, value in subject if name == "commonName"],
        "x509_subject_alternative_name": [value.encode() for _, value in certificate.get("subjectAltName", ())],
    }
