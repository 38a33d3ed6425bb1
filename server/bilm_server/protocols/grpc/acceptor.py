"""A gRPC server that continues to take calls in.

grpc.aio (1.85.1) ends its loop at the first call whose `:path` isn't UTF-8 and closes the port with it, while the
process lives on: one frame of any client, before any interceptor sees it. Calls in flight are not touched.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import grpc

from bilm_server.errors import BindError
from bilm_server.protocols.grpc.listening import Address

_log = logging.getLogger(__name__)

# Names of grpc.aio's coroutines
_LOOP, _REACTION = "_server_main_loop", "shutdown"
_REBIND_ATTEMPTS = 50
_REBIND_PAUSE_S = 0.1


class Acceptor:
    """Starts a gRPC server, and another in its place if it stops taking calls in."""

    def __init__(
        self,
        new_server: Callable[[], grpc.aio.Server],
        add_services: Callable[[grpc.aio.Server], None],
        address: Address,
        grace_s: float,
        *,
        starting: asyncio.Lock,
        line: str = "listening on",
    ) -> None:
        """Keep what servers are made of; call `start` to listen.

        Args:
            new_server: makes one, without services.
            add_services: registers them.
            address: to listen on; released by `stop`.
            grace_s: for the calls in flight of a server that was replaced.
            starting: one for all acceptors of an event loop: a new server's loop is found among all that run.
            line: what the log has before the address.
        """
        self._new_server, self._add_services = new_server, add_services
        self._address, self._grace_s, self._starting, self._line = address, grace_s, starting, line
        self._servers: list[grpc.aio.Server] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self.lost = asyncio.Event()
        """Set when nothing listens any more."""
        self.target = ""
        """The target for clients, once it has started."""

    async def start(self) -> str:
        """Listen, and return the line that the log has about it.

        Raises:
            BindError: if the address can't be listened on.
        """
        await self._start()
        return f"{self._line} {self.target}"

    async def stop(self, grace_s: float = 0) -> None:
        """Refuse new calls, give those in flight some time, and end; idempotent."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        self._servers.clear()
        self._address.release()

    async def _start(self) -> None:
        server = self._new_server()
        self._add_services(cast("grpc.aio.Server", _ByName(server)))
        async with self._starting:
            self.target = self._address.bind(server)
            self._servers.append(server)  # whatever happens from here on, `stop` ends it
            others = _running(_LOOP)
            await server.start()
            loops = _running(_LOOP) - others
        for loop in loops:
            loop.add_done_callback(partial(self._ended, server))
        if not loops:
            _log.warning("grpc has no loop that could be watched; one bad call may end it unseen")

    def _ended(self, server: grpc.aio.Server, loop: "asyncio.Task[Any]") -> None:
        if self._stopping or loop.cancelled() or (crash := loop.exception()) is None:
            return
        _log.warning(
            "grpc stopped taking calls in (%s): listening anew", type(crash).__name__
        )  # its text is a caller's
        task = asyncio.get_running_loop().create_task(self._replace(server, _running(_REACTION)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, old: grpc.aio.Server, reactions: set["asyncio.Task[Any]"]) -> None:
        # grpc's own reaction is to shut down, which fails with the crash once more; two at a time end the process
        await asyncio.gather(*reactions, return_exceptions=True)
        if not await self._start_again():
            self.lost.set()
        await old.stop(self._grace_s)
        self._servers.remove(old)

    async def _start_again(self) -> bool:
        for _ in range(_REBIND_ATTEMPTS):
            try:
                await self._start()
            except BindError:
                await asyncio.sleep(_REBIND_PAUSE_S)
            else:
                return True
        return False


class _ByName:
    """Takes services as generated code adds them, and has grpc find their methods by name, call by call.

    Generated code also registers each method, to be found faster; but for each of those grpc.aio has a request waiting
    in its core, and when its loop has ended by an error it frees them while they are still waiting: the process ends.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Part of grpc's interface."""


def _running(name: str) -> set["asyncio.Task[Any]"]:
    return {task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") == name}
