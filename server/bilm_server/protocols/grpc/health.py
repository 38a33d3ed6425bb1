"""The standard health service: SERVING is reported only when inference has been seen to work, of each model."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
from bilm_api.constants import MODEL_HEALTH
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVENESS = "liveness"
"""The name to ask for whether the process should continue; neither load nor a failing model changes it."""

INFERENCE = "inference"
"""The name to ask for whether a call would be computed; unlike readiness it stays SERVING while the server drains."""

_log = logging.getLogger(__name__)

_Response = health_pb2.HealthCheckResponse
_SERVING, _NOT_SERVING, _UNKNOWN = _Response.SERVING, _Response.NOT_SERVING, _Response.SERVICE_UNKNOWN


class HealthReporter(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health`: readiness, inference, and liveness.

    Readiness of the server as a whole ("") and of one service is that of the default model; each model has its own.

    It holds the only record of health, used from the event loop; `serving` may be read from any thread. Reports change
    it without awaiting anything, so they take effect in the order in which they are made. Everything that follows
    health, the service's own watchers included, waits for changes and reads the record again.
    """

    def __init__(self, service: str, models: Sequence[str] = ()) -> None:
        """Start alive and not ready.

        Args:
            service: full name of the service whose readiness is reported beside the server's.
            models: names of those that will be served, the default one first.
        """
        self._readiness = ("", service)
        self._works: Mapping[str, bool] = dict.fromkeys(models, False)
        self._draining = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether readiness is SERVING."""
        return self.is_ready("")

    def is_ready(self, model: str) -> bool:
        """Return whether the readiness of a model is SERVING; "": of the default one."""
        works = self._works.get(model, False) if model else next(iter(self._works.values()), False)
        return works and not self._draining

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set at the next change; take it before reading the record."""
        return self._changed

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def set(self, works: Mapping[str, bool]) -> None:
        """Report whether each model works, the default one first; while the server drains, none is ready."""
        if works == self._works and [*works][:1] == [*self._works][:1]:
            return
        for number, (model, now) in enumerate(works.items()):
            if now != self._works.get(model, False) and not self._draining:
                of_model = f" of {model}" if number else ""  # the default one's is the server's
                level = logging.INFO if now else logging.WARNING
                _log.log(level, "health%s: %sSERVING", of_model, "" if now else "NOT_")
        self._works = dict(works)
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
            **{MODEL_HEALTH + model: _SERVING if self.is_ready(model) else _NOT_SERVING for model in self._works},
            INFERENCE: _SERVING if any(self._works.values()) else _NOT_SERVING,
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
