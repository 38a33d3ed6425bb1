"""Listens for HTTP: accepts connections, counts them, and drains them with the rest of the server.

To be imported only where HTTP is wanted: it needs the extra `http`, and raises a ConfigurationError without it.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bilm_server.addresses import split_address
from bilm_server.errors import BindError, ConfigurationError

try:
    from uvicorn.server import ServerState

    from bilm_server.protocols.http.connection import Connection, new_config
    from bilm_server.protocols.http.routing import HttpApp
except ImportError as missing:
    raise ConfigurationError("http_listen: needs the extra `http`: pip install 'bilm-serve[http]'") from missing

REQUEST_TIMEOUT_S: Final = 30.0
"""From the first byte of a request to its last."""
_HANDSHAKE_TIMEOUT_S = 20.0
_CLOSE_TIMEOUT_S = 2.0
_ACCEPT_PAUSE_S = 1.0
_BACKLOG = 1024
_MAX_UNSENT_BYTES = 128 * 1024

_log = logging.getLogger(__name__)

NewContext = Callable[[], ssl.SSLContext]


class HttpDoor:
    """Listens on one address; used from the event loop only."""

    def __init__(
        self,
        listen: str,
        app: HttpApp,
        max_connections: Callable[[], int],
        tls: Callable[[], NewContext | None],
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Keep what listening needs; call `start` to listen.

        Args:
            listen: HOST:PORT, port 0: any free one.
            app: answers the calls.
            max_connections: returns how many there may be at a time; those beyond are closed as soon as they are open.
            tls: reads the files, and returns what makes the context of each handshake; None: no TLS.
            request_timeout_s: from the first byte of a request to its last.
        """
        self._setting, self._listen = listen, split_address(listen)
        self.app = app
        self._max_connections, self._tls, self._request_timeout_s = max_connections, tls, request_timeout_s
        self._config, self._state = new_config(app), ServerState()
        self._socket: socket.socket | None = None
        self._new_context: NewContext | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._open_connections: set[Connection] = set()
        self._empty = asyncio.Event()
        self.address = ""
        """HOST:PORT, once it has started."""

    @property
    def n_connections(self) -> int:
        """Connections open now, those in their handshake included."""
        return len(self._open_connections)

    async def start(self) -> str:
        """Listen, and return the line that the log has about it.

        Raises:
            BindError: if the address can't be listened on.
            ConfigurationError: if the files of TLS can't be used.
        """
        self._new_context = self._tls()
        host, port = self._listen
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise BindError(f"http_listen: can't listen on {self._setting}") from error
        self._socket.setblocking(False)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        self._accepting = asyncio.create_task(self._accept(self._socket, self._max_connections()))
        return f"HTTP on {'https' if self._new_context else 'http'}://{self.address}"

    async def drain(self, grace_s: float) -> None:
        """Accept no more, and give the calls that run some time; what is left then is aborted."""
        await self._refuse_more()
        for connection in self._connections():
            connection.shutdown()
        await self._wait_until_empty(grace_s)
        for connection in self._connections():
            connection.abort()
        await self._wait_until_empty(_CLOSE_TIMEOUT_S)
        await asyncio.gather(*self._state.tasks, return_exceptions=True)

    async def stop(self) -> None:
        """End everything; idempotent."""
        await self.drain(0)

    def _connections(self) -> tuple[Connection, ...]:
        return tuple(each for each in self._state.connections if isinstance(each, Connection))

    async def _refuse_more(self) -> None:
        tasks = [*self._opening, *(() if self._accepting is None else (self._accepting,))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _wait_until_empty(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self._state.connections:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            _log.debug("%d connections are still open", len(self._state.connections))

    # ---- connections ----

    async def _accept(self, listener: socket.socket, max_connections: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(listener)
            except OSError as error:  # without descriptors, for one
                _log.warning("can't accept a connection: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if self.n_connections >= max_connections:
                accepted.close()
                continue
            _bound_unsent(accepted)
            connection = Connection(self._config, self._state, peer, self._lost, self._request_timeout_s)
            self._open_connections.add(connection)
            task = asyncio.create_task(self._open(connection, accepted))
            self._opening.add(task)
            task.add_done_callback(partial(self._opened, connection, accepted))

    async def _open(self, connection: Connection, accepted: socket.socket) -> None:
        """Give a connection its socket, after the handshake where there is TLS."""
        tls: dict[str, Any] = {}
        try:
            if self._new_context is not None:
                tls = {"ssl": self._new_context(), "ssl_handshake_timeout": _HANDSHAKE_TIMEOUT_S}
                tls["ssl_shutdown_timeout"] = _CLOSE_TIMEOUT_S
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, accepted, **tls)
        except OSError as error:  # TLS's errors among them
            _log.debug("a connection failed in its handshake: %s", type(error).__name__)

    def _opened(self, connection: Connection, accepted: socket.socket, task: "asyncio.Task[None]") -> None:
        """Close what no connection was made of; a task that was cancelled before it began has closed nothing."""
        self._opening.discard(task)
        if not connection.made:
            accepted.close()
            self._lost(connection)

    def _lost(self, connection: Connection) -> None:
        self._open_connections.discard(connection)
        self._empty.set()


def _bound_unsent(accepted: socket.socket) -> None:
    """Have the kernel take no more than it may soon send: else a client that reads nothing has it hold 4 MiB.

    Windows has no such option; there the kernel's own buffer is the bound.
    """
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None:
        accepted.setsockopt(socket.IPPROTO_TCP, option, _MAX_UNSENT_BYTES)
