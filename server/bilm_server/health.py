"""The standard health service: SERVING is said only when inference has been seen to work."""

import asyncio
import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

_log = logging.getLogger("bilm_server.health")


class HealthReporter:
    """`grpc.health.v1.Health`, for the server as a whole ("") and for one service."""

    def __init__(self, service: str) -> None:
        self._names = ("", service)
        self._servicer = health.aio.HealthServicer()
        self._serving: bool | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def report(self, serving: bool) -> None:
        """Says whether inference works; called on the event loop."""
        task = asyncio.get_running_loop().create_task(self.set(serving))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def set(self, serving: bool) -> None:
        """Like `report`; done when it returns."""
        if serving != self._serving:
            _log.log(logging.INFO if serving else logging.WARNING, "health: %sSERVING", "" if serving else "NOT_")
        self._serving = serving
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """NOT_SERVING from now on, whatever is reported."""
        await self._servicer.enter_graceful_shutdown()
