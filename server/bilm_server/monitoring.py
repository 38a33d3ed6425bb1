"""Who watches the calls and the engine: access log, metrics, traces; put together as configured."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bilm_server.admission import Admission
from bilm_server.callers import CallerRights, NoLogCalls
from bilm_server.calls import CallObserver
from bilm_server.config import ServerConfig
from bilm_server.health import HealthReporter
from bilm_server.inference import Round
from bilm_server.logs import AccessLog
from bilm_server.metrics import Metrics, ServerView, Taken
from bilm_server.metrics_http import MetricsExporter
from bilm_server.parts import Parts
from bilm_server.resources import Gpu, find_gpu
from bilm_server.served_model import ServedModel
from bilm_server.stream_room import StreamRoom
from bilm_server.watchdog import Watchdog

if TYPE_CHECKING:
    from bilm_server.tracing import Tracing


@dataclass(frozen=True)
class Losses:
    """What the process couldn't say, since its start.

    Attributes:
        log_lines: that were not written.
        alerts: that were not sent.
    """

    log_lines: Callable[[], int]
    alerts: Callable[[], int]


NO_LOSSES = Losses(lambda: 0, lambda: 0)
"""Of a process that doesn't log by itself."""


class Monitoring:
    """Observers of a server, and what they need to start and stop."""

    def __init__(self, config: ServerConfig, service: str, losses: Losses, rights: CallerRights) -> None:
        """Prepares.

        Args:
            config: the server's.
            service: full name of the service whose calls are traced.
            losses: for the metrics.
            rights: of callers, for the names that their uses are counted by.

        Raises:
            ConfigurationError: if traces are wanted and what they need isn't installed.
        """
        self._config, self._losses = config, losses
        self._no_log_calls = NoLogCalls(rights)
        self._tracing = _new_tracing(config, service)
        self._metrics: Metrics | None = None
        self._exporter: MetricsExporter | None = None

    def observe(self, parts: Parts, health: HealthReporter, watchdog: Watchdog, max_connections: int) -> None:
        """Says what the metrics are of; before anything else."""
        engine, inference, tracing = parts.model.engine, parts.inference, self._tracing
        view = ServerView(
            model=_labels(parts.model),
            kernel_paths=lambda: engine.paths,
            max_rows=engine.max_rows,
            max_connections=max_connections,
            serving=lambda: health.serving,
            stalled_s=lambda: watchdog.stalled_s,
            rows=lambda: inference.in_flight,
            waiting_sentences=lambda: inference.waiting,
            cache=lambda: (engine.stats.cache.hits, engine.stats.cache.misses),
            ticks=lambda: engine.stats.ticks,
            admitted=lambda: {"unary": _taken(parts.admission), "stream": _taken(parts.stream_admission)},
            log_lines_dropped=self._losses.log_lines,
            alerts_dropped=self._losses.alerts,
            no_log_calls=lambda: self._no_log_calls.counts,
            spans_failed=lambda: 0 if tracing is None else tracing.failed,
            gpu=_gpu(engine.device),
        )
        self._metrics = Metrics(view)

    @property
    def observers(self) -> tuple[CallObserver, ...]:
        """In the order in which they have to see a call: its line in the log needs the span, which ends last."""
        assert self._metrics is not None  # noqa: S101 - observe() comes first
        if self._tracing is None:
            return (AccessLog(), self._no_log_calls, self._metrics)
        return (AccessLog(self._tracing.trace_id), self._no_log_calls, self._metrics, self._tracing)

    def on_round(self, done: Round) -> None:
        """Counts a round of the engine; in its thread."""
        if self._metrics is not None:
            self._metrics.round(done.rows, done.failed)

    def start(self) -> str:
        """Offers the metrics, if that is configured; returns where.

        Raises:
            OSError: if the address can't be listened on.
        """
        if not self._config.metrics_listen:
            return ""
        assert self._metrics is not None  # noqa: S101 - observe() comes first
        self._exporter = MetricsExporter(self._metrics.registry, self._config.metrics_listen)
        self._exporter.start()
        return self._exporter.address

    async def stop(self) -> None:
        """Sends what there is; idempotent."""
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.stop)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.stop)


def _new_tracing(config: ServerConfig, service: str) -> "Tracing | None":
    if not config.trace_endpoint:
        return None
    from bilm_server.tracing import start_tracing  # noqa: PLC0415 - OpenTelemetry is an extra

    instance = f"{socket.gethostname()}:{config.listen.rpartition(':')[2]}"
    return start_tracing(config.trace_endpoint, config.trace_sample_ratio, service, instance)


def _labels(model: ServedModel) -> dict[str, str]:
    return {
        "name": model.name,
        "version": model.version,
        "precision": model.precision,
        "backend": model.engine.backend,
        "tokenizer": model.tokenizer.name,
    }


def _taken(admission: Admission | StreamRoom) -> Taken:
    return Taken(admission.used, admission.capacity)


def _gpu(device: torch.device) -> Gpu | None:
    return find_gpu(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else None
