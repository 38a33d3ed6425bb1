"""The small HTTP server that offers the metrics. Bounded in connections, in time and in what it reads."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from bilm_server.addresses import split_address
from bilm_server.errors import BindError

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 16
_EXCHANGE_TIMEOUT_S = 5.0
_MAX_HEAD_BYTES = 8 * 1024
_START_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 5.0
_END_OF_HEAD = b"\r\n\r\n"


class MetricsExporter:
    """Offers a registry at /metrics, over HTTP without TLS, on its own event loop in its own thread.

    A connection serves one request and gets 5 s for all of it; those beyond 16 at a time are closed at once. So idle
    and slow clients cost no more than that, and the event loop of the service nothing.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        listen: str,
        exchange_timeout_s: float = _EXCHANGE_TIMEOUT_S,
        *,
        start_timeout_s: float = _START_TIMEOUT_S,
        new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        """Keep what is to be offered; call `start`, or `open`, to listen.

        Args:
            registry: what to offer.
            listen: HOST:PORT, port 0: any free one.
            exchange_timeout_s: for all of a connection.
            start_timeout_s: for the thread to listen.
            new_loop: makes the thread's event loop.
        """
        self._start_timeout_s, self._new_loop = start_timeout_s, new_loop
        self._registry, self._setting, self._listen = registry, listen, split_address(listen)
        self._exchange_timeout_s = exchange_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked = asyncio.Event()
        self._thread: threading.Thread | None = None
        self.address = ""
        """HOST:PORT, once it has started."""
        self.n_connections = 0
        """Connections open now."""

    async def start(self) -> str:
        """Listen, and return the line that the log has about it.

        Raises:
            BindError: if that isn't possible.
        """
        try:
            await asyncio.to_thread(self.open)
        except OSError as error:
            raise BindError(f"metrics_listen: can't listen on {self._setting}") from error
        return f"metrics on http://{self.address}/metrics"

    async def stop(self) -> None:
        """End it, connections included; idempotent."""
        await asyncio.to_thread(self.close)

    def open(self) -> None:
        """Listen; blocks until the thread does.

        Raises:
            OSError: if the address can't be listened on, or the thread doesn't begin to in time.
        """
        host, port = self._listen
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_MAX_CONNECTIONS)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.address = f"{shown}:{listener.getsockname()[1]}"
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(listener, started), name="metrics", daemon=True)
        self._thread.start()
        try:
            started.result(self._start_timeout_s)
        except TimeoutError:
            self._stop_asked.set()  # for when it does begin
            raise TimeoutError(f"its thread did not begin within {self._start_timeout_s:g} s") from None

    def close(self) -> None:
        """End it, connections included; blocks until the thread has ended; idempotent."""
        if self._thread is not None and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the thread has ended, or is about to
                self._loop.call_soon_threadsafe(self._stop_asked.set)
            self._thread.join(_STOP_TIMEOUT_S)

    # ---- in the thread ----

    def _run(self, listener: socket.socket, started: "Future[None]") -> None:
        try:
            with listener, asyncio.Runner(loop_factory=self._new_loop) as runner:
                runner.run(self._serve(listener, started))
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, listener: socket.socket, started: "Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connected, sock=listener, limit=_MAX_HEAD_BYTES)
        started.set_result(None)
        await self._stop_asked.wait()
        server.close()  # and asyncio.run cancels what still runs

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        try:
            if self.n_connections <= _MAX_CONNECTIONS:
                async with asyncio.timeout(self._exchange_timeout_s):
                    await self._exchange(reader, writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("a scrape failed: %s", type(error).__name__)
        finally:
            self.n_connections -= 1
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(_END_OF_HEAD)
        writer.write(self._response(head.decode("latin-1")))
        writer.close()
        await writer.wait_closed()  # that is, until the client has taken everything

    def _response(self, head: str) -> bytes:
        request, *headers = head.split("\r\n")
        method, _, target = request.partition(" ")
        if target.partition(" ")[0].partition("?")[0] != "/metrics":
            return _http("404 Not Found")
        if method != "GET":
            return _http("405 Method Not Allowed", extra="Allow: GET\r\n")
        accept = next((line.partition(":")[2] for line in headers if line.lower().startswith("accept:")), "")
        try:
            encode, content_type = choose_encoder(accept.strip())
            return _http("200 OK", encode(self._registry), f"Content-Type: {content_type}\r\n")
        except Exception:
            _log.exception("the metrics can't be collected")
            return _http("500 Internal Server Error")


def _http(status: str, body: bytes = b"", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{extra}\r\n".encode() + body
