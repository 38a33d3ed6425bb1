"""A gRPC server that goes on taking calls in.

grpc.aio (1.85.1) ends its loop at the first call whose `:path` isn't UTF-8 and closes the port with it, while the
process lives on: one frame from anybody, before any interceptor sees it. Calls in flight are not touched.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import grpc

from bilm_server.listening import BindError

_log = logging.getLogger("bilm_server.acceptor")

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
        bind: Callable[[grpc.aio.Server, str], str],
        grace_s: float,
    ) -> None:
        """Keeps its arguments.

        Args:
            new_server: makes one, without services.
            add_services: registers them.
            bind: has it listen on an address; says where clients find it. Raises BindError.
            grace_s: for the calls in flight of a server that was replaced.
        """
        self._new_server, self._add_services = new_server, add_services
        self._bind, self._grace_s = bind, grace_s
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self.lost = asyncio.Event()
        """Set when nothing listens any more."""
        self.target = ""
        """Where clients find the server, once it has started."""

    async def start(self, listen: str) -> None:
        """Listens.

        Raises:
            BindError: if that can't be.
        """
        await self._start(listen)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives those in flight some time, and ends; idempotent."""
        self._stopping = True
        if self._server is not None:
            await self._server.stop(grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _start(self, listen: str) -> None:
        server = self._new_server()
        self._add_services(cast("grpc.aio.Server", _ByName(server)))
        self.target = self._bind(server, listen)
        others = _running(_LOOP)
        await server.start()
        self._server = server
        loops = _running(_LOOP) - others
        for loop in loops:
            loop.add_done_callback(self._ended)
        if not loops:
            _log.warning("grpc has no loop that could be watched; one bad call may end it unseen")

    def _ended(self, loop: "asyncio.Task[Any]") -> None:
        if self._stopping or loop.cancelled() or (crash := loop.exception()) is None:
            return
        _log.warning(
            "grpc stopped taking calls in (%s): listening anew", type(crash).__name__
        )  # its text is a caller's
        task = asyncio.get_running_loop().create_task(self._replace(_running(_REACTION)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, reactions: set["asyncio.Task[Any]"]) -> None:
        # grpc's own reaction is to shut down, which fails with the crash once more; two at a time end the process
        await asyncio.gather(*reactions, return_exceptions=True)
        old = self._server
        for _ in range(_REBIND_ATTEMPTS):
            try:
                await self._start(self.target)
                break
            except BindError:
                await asyncio.sleep(_REBIND_PAUSE_S)
        else:
            self.lost.set()
        if old is not None:
            await old.stop(self._grace_s)


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
