"""A TCP proxy that does to connections what networks do to them: delay, hold, swallow, finish and reset."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

Side = Literal["client", "server"]

_CHUNK_BYTES = 64 * 1024
_CALL_TIMEOUT_S = 10.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class FaultyProxy:
    """Passes bytes between its own port of the loopback and another one, in a thread of its own.

    Attributes:
        delay_s: How long each piece of bytes is kept, in both directions.
        refusing: Whether new connections are reset at once.
        cut_in_bytes: After so many more bytes from the server, their connection is reset, once; None: never.
        n_cuts: How often that has happened.
        n_accepted: Connections that were ever accepted.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._passing: asyncio.Event | None = None
        self.delay_s = 0.0
        self.refusing = False
        self.cut_in_bytes: int | None = None
        self.n_accepted = 0
        self.n_cuts = 0
        self.target = ""
        """Where clients find it, once it has started."""

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(_CALL_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(_CALL_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def n_links(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    # ---- faults ----

    def hold(self) -> None:
        """Keeps all bytes back until `go_on`; nothing is lost, connections stay open."""
        self._call(lambda: self._open_passing().clear())

    def go_on(self) -> None:
        """Passes bytes again, those that were held first."""
        self._call(lambda: self._open_passing().set())

    def swallow(self) -> None:
        """From now on the bytes of today's connections are lost, while both ends believe them to be open."""
        self._call(lambda: self._each(lambda link: link.swallow()))

    def finish(self, side: Side) -> None:
        """Sends one end of each of today's connections a FIN; the other end isn't told, and its bytes are lost."""
        self._call(lambda: self._each(lambda link: link.finish(side)))

    def reset(self) -> None:
        """Resets both ends of each connection."""
        self._call(lambda: self._each(lambda link: link.reset()))

    # ---- in the thread ----

    async def _start(self) -> None:
        self._passing = asyncio.Event()
        self._passing.set()
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_CHUNK_BYTES)
        self.target = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def _stop(self) -> None:
        assert self._listener is not None
        self._listener.close()
        self._open_passing().set()
        tasks = [link.task for link in self._links]
        self._each(lambda link: link.reset())
        if tasks:
            await asyncio.wait(tasks, timeout=_CALL_TIMEOUT_S / 2)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_accepted += 1
        task = asyncio.current_task()
        assert task is not None
        try:
            if self.refusing:
                raise ConnectionRefusedError
            upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=_CHUNK_BYTES)
        except OSError:
            _abort(writer)
            return
        link = _Link(self, (reader, writer), upstream, task)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)

    def _each(self, act: "Callable[[_Link], None]") -> None:
        for link in tuple(self._links):
            act(link)

    def _call(self, act: Callable[[], None]) -> None:
        async def acting() -> None:
            act()

        asyncio.run_coroutine_threadsafe(acting(), self._loop).result(_CALL_TIMEOUT_S)

    def _open_passing(self) -> asyncio.Event:
        assert self._passing is not None, "the proxy hasn't started"
        return self._passing

    def cuts(self, n_bytes: int) -> bool:
        """Counts bytes from the server; whether their connection is to be reset."""
        if self.cut_in_bytes is None:
            return False
        self.cut_in_bytes -= n_bytes
        if self.cut_in_bytes > 0:
            return False
        self.cut_in_bytes = None
        self.n_cuts += 1
        return True

    async def pass_time(self) -> None:
        """Waits as long as a piece of bytes has to."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._open_passing().wait()


End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: FaultyProxy, client: End, server: End, task: "asyncio.Task[None]") -> None:
        self._proxy = proxy
        self._client, self._server = client, server
        self._swallowing = False
        self.task = task

    async def run(self) -> None:
        """Passes bytes until both ends are done."""
        (client_reader, client_writer), (server_reader, server_writer) = self._client, self._server
        try:
            await asyncio.gather(
                self._pump(client_reader, server_writer), self._pump(server_reader, client_writer, from_server=True)
            )
        finally:
            for writer in (client_writer, server_writer):
                writer.close()
            for writer in (client_writer, server_writer):
                with suppress(OSError):
                    await writer.wait_closed()

    def swallow(self) -> None:
        self._swallowing = True

    def finish(self, side: Side) -> None:
        self._swallowing = True
        writer = (self._client if side == "client" else self._server)[1]
        with suppress(OSError):
            writer.write_eof()

    def reset(self) -> None:
        for _, writer in (self._client, self._server):
            _abort(writer)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_server: bool = False
    ) -> None:
        try:
            while piece := await reader.read(_CHUNK_BYTES):
                await self._proxy.pass_time()
                if not self._swallowing:
                    writer.write(piece)
                    await writer.drain()
                if from_server and self._proxy.cuts(len(piece)):
                    self.reset()
            if not self._swallowing:
                writer.write_eof()
        except OSError:  # one end was reset; the other one must hear of it, as without a proxy between them
            if not self._swallowing:
                self.reset()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Closes with a RST: whatever is on its way is lost."""
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
