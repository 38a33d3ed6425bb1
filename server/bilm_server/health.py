"""The standard health service: SERVING is said only when inference has been seen to work."""

import logging
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

LIVENESS = "liveness"
"""The name to ask for whether the process should go on; it doesn't depend on load, nor on whether the model works."""

INFERENCE = "inference"
"""The name to ask for whether a call would be answered; unlike readiness it stays SERVING while the server drains."""

_log = logging.getLogger("bilm_server.health")

_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class HealthReporter:
    """`grpc.health.v1.Health`: readiness, of the server as a whole ("") and of one service; inference; and liveness."""

    def __init__(self, service: str) -> None:
        self._names = ("", service)
        self._servicer = health.aio.HealthServicer()
        self._serving: bool | None = None
        self._draining = False

    @property
    def serving(self) -> bool:
        """Whether it says SERVING."""
        return bool(self._serving) and not self._draining

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Alive, but not ready."""
        await self._servicer.set(LIVENESS, _SERVING)
        await self.set(False)

    async def set(self, serving: bool) -> None:
        """Says whether the engine works; while the server drains it is not ready all the same."""
        if serving == self._serving:
            return
        _log.log(logging.INFO if serving else logging.WARNING, "health: %sSERVING", "" if serving else "NOT_")
        self._serving = serving
        await self._tell((INFERENCE,) if self._draining else (INFERENCE, *self._names), serving)

    async def drain(self) -> None:
        """Not ready from now on, whatever is said later; alive all the same."""
        self._draining = True
        await self._tell(self._names, False)

    async def _tell(self, names: Iterable[str], serving: bool) -> None:
        for name in names:
            await self._servicer.set(name, _SERVING if serving else _NOT_SERVING)
