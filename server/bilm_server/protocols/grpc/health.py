"""The standard health service: SERVING is reported only when inference has been seen to work."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVENESS = "liveness"
"""The name to ask for whether the process should continue; neither load nor a failing model changes it."""

INFERENCE = "inference"
"""The name to ask for whether a call would be computed; unlike readiness it stays SERVING while the server drains."""

_log = logging.getLogger(__name__)

_Response = health_pb2.HealthCheckResponse
_SERVING, _NOT_SERVING, _UNKNOWN = _Response.SERVING, _Response.NOT_SERVING, _Response.SERVICE_UNKNOWN


class HealthReporter(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health`: readiness, of the server as a whole ("") and of one service; inference; and liveness.

    It holds the only record of health, used from the event loop; `serving` may be read from any thread. Reports change
    it without awaiting anything, so they take effect in the order in which they are made. Everything that follows
    health, the service's own watchers included, waits for changes and reads the record again.
    """

    def __init__(self, service: str) -> None:
        """Start alive and not ready.

        Args:
            service: full name of the service whose readiness is reported beside the server's.
        """
        self._readiness = ("", service)
        self._works = self._draining = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether readiness is SERVING."""
        return self._works and not self._draining

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set at the next change; take it before reading the record."""
        return self._changed

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def set(self, works: bool) -> None:
        """Report whether the engine works; while the server drains it isn't ready all the same."""
        if works == self._works:
            return
        _log.log(logging.INFO if works else logging.WARNING, "health: %sSERVING", "" if works else "NOT_")
        self._works = works
        self._tell()

    def drain(self) -> None:
        """End readiness for good, whatever is reported later; the process is alive all the same."""
        self._draining = True
        self._tell()

    def statuses(self) -> dict[str, int]:
        """Return the status of each name that can be asked for."""
        readiness = _SERVING if self.serving else _NOT_SERVING
        return {
            **dict.fromkeys(self._readiness, readiness),
            INFERENCE: _SERVING if self._works else _NOT_SERVING,
            LIVENESS: _SERVING,
        }

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # ---- the contract's methods ----

    async def Check(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:  # noqa: N802
        """Return a name's status, or end with NOT_FOUND."""
        status = self.statuses().get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "service: unknown name")
        return _Response(status=status)

    async def Watch(  # noqa: N802
        self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[Any]:
        """Yield a name's status, now and at each change; SERVICE_UNKNOWN for other names."""
        last: int | None = None
        while True:
            changed = self.changed
            status = self.statuses().get(request.service, _UNKNOWN)
            if status != last:
                last = status
                yield _Response(status=status)
            await changed.wait()

    async def List(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:  # noqa: N802
        """Return the status of every name; registered where the installed grpcio-health-checking has it."""
        statuses = {name: _Response(status=status) for name, status in self.statuses().items()}
        messages: Any = health_pb2  # its stubs lack this one
        return messages.HealthListResponse(statuses=statuses)
