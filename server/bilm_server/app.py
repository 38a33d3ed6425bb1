"""The composition root: builds each part of a server once, and hands each what it needs."""

import asyncio
import logging
import socket
from functools import cache, cached_property
from typing import TYPE_CHECKING

import grpc
import torch
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from bilm_server.config import ServerConfig
from bilm_server.embedding.admission import Admission, StreamAdmission
from bilm_server.embedding.call_gate import CallGate
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.conversions import Conversions
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.inference.watchdog import Watchdog
from bilm_server.inference.worker import InferenceWorker
from bilm_server.lifecycle import DrainTimes, Listener, Server
from bilm_server.observability.access_log import AccessLog
from bilm_server.observability.call_record import CallObserver
from bilm_server.observability.metrics import Metrics
from bilm_server.observability.no_log_calls import NoLogCalls
from bilm_server.observability.resources import Gpu, find_gpu
from bilm_server.observability.server_metrics import (
    NO_DROPS,
    DropCounts,
    EngineView,
    ServerCollector,
    ServerView,
    Taken,
)
from bilm_server.protocols.embed_v1.service import EmbedService
from bilm_server.protocols.grpc.acceptor import Acceptor
from bilm_server.protocols.grpc.connections import connection_limit, health_server
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.grpc.interceptors import CallInterceptor, OpenCalls, OpenInterceptor
from bilm_server.protocols.grpc.listening import address, channel_options, credentials
from bilm_server.protocols.ops.metrics_endpoint import MetricsExporter
from bilm_server.protocols.ops.readiness_port import ReadinessPort
from bilm_server.security.auth import Authenticator
from bilm_server.security.callers import CallerRights
from bilm_server.served_model import ServedModel

if TYPE_CHECKING:
    from bilm_server.observability.tracing import Tracing

SERVICE_NAME = embed_pb2.DESCRIPTOR.services_by_name["EmbedService"].full_name
HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_log = logging.getLogger(__name__)

_MIB = 2**20


def build_server(config: ServerConfig, model: ServedModel, drops: DropCounts = NO_DROPS) -> Server:
    """Return a server that has not started.

    Nothing is listened on, and no file is read, before `Server.start`.

    Args:
        config: all settings.
        model: what to serve.
        drops: log lines and alerts lost by the process, for the metrics.

    Raises:
        ConfigurationError: if traces are configured and what they need isn't installed.
    """
    return _App(config, model, drops).server


class _App:
    """Each part of one server, built when the first other part needs it."""

    def __init__(self, config: ServerConfig, model: ServedModel, drops: DropCounts) -> None:
        self._config, self._model, self._drops = config, model, drops
        self._max_connections = cache(lambda: connection_limit(config.max_connections))
        self._starting = asyncio.Lock()
        self._open_calls = OpenCalls()
        self._metrics = Metrics([model.name])
        self._health = HealthReporter(SERVICE_NAME)
        self._rights = CallerRights(config.callers, config.authenticates)
        self._no_log_calls = NoLogCalls(self._rights)
        self._authenticator = Authenticator(config.token_file)

    @cached_property
    def server(self) -> Server:
        config = self._config
        self._metrics.registry.register(ServerCollector(self._view))
        return Server(
            self._embedder,
            self._health,
            self._watchdog,
            self._acceptor,
            self._listeners(),
            open_calls=self._open_calls,
            drain_times=DrainTimes(config.drain_delay_s, config.grace_s),
            prepare=(self._authenticator.load, self._warn_of_nameless_callers, self._max_connections),
            close=(self._embedder.conversions.stop, *(() if self._tracing is None else (self._tracing.stop,))),
        )

    @cached_property
    def _embedder(self) -> Embedder:
        config, metrics = self._config, self._metrics
        return Embedder(
            model=self._model,
            worker=InferenceWorker(
                self._model.engine, lambda report: metrics.round(self._model.name, report.rows, report.failed)
            ),
            limits=RequestLimits.of(config),
            conversions=Conversions(),
            admission=Admission(config.max_waiting_tokens, config.max_waiting_mib * _MIB),
            stream_admission=StreamAdmission(config.max_stream_tokens, config.max_stream_mib * _MIB),
            caller_limits=self._caller_limits,
        )

    @cached_property
    def _caller_limits(self) -> CallerLimits:
        config = self._config
        return CallerLimits(config.caller_tokens_per_s, config.caller_max_calls, config.max_tokens_per_request)

    @cached_property
    def _watchdog(self) -> Watchdog:
        config = self._config
        return Watchdog(self._embedder.worker, config.hang_s, config.give_up_s, self._health.set)

    # ---- who observes ----

    @cached_property
    def _gate(self) -> CallGate:
        return CallGate(self._authenticator, self._rights, self._caller_limits, self._observers())

    def _observers(self) -> tuple[CallObserver, ...]:
        """Return the observers in the order in which they see a call: its log line needs the span, which ends last."""
        if self._tracing is None:
            return (AccessLog(), self._no_log_calls, self._metrics)
        return (AccessLog(self._tracing.trace_id), self._no_log_calls, self._metrics, self._tracing)

    @cached_property
    def _tracing(self) -> "Tracing | None":
        config = self._config
        if not config.trace_endpoint:
            return None
        from bilm_server.observability.tracing import start_tracing  # noqa: PLC0415 - OpenTelemetry is an extra

        instance = f"{socket.gethostname()}:{config.listen.rpartition(':')[2]}"
        return start_tracing(config.trace_endpoint, config.trace_sample_ratio, SERVICE_NAME, instance)

    @property
    def _view(self) -> ServerView:
        embedder, tracing = self._embedder, self._tracing
        return ServerView(
            engines=[self._engine_view],
            max_connections=self._max_connections,
            serving=lambda: self._health.serving,
            admitted=lambda: {"unary": _taken(embedder.admission), "stream": _taken(embedder.stream_admission)},
            drops=self._drops,
            no_log_calls=lambda: self._no_log_calls.counts,
            spans_failed=lambda: 0 if tracing is None else tracing.failed,
            gpu=_gpu(torch.device(self._model.engine.description.device)),
        )

    @property
    def _engine_view(self) -> EngineView:
        engine, worker, watchdog = self._model.engine, self._embedder.worker, self._watchdog
        return EngineView(
            model=_labels(self._model),
            kernel_paths=lambda: engine.description.paths,
            max_rows=engine.capacity.rows,
            stalled_s=lambda: watchdog.stalled_s,
            rows=lambda: worker.in_flight,
            waiting_sentences=lambda: worker.waiting,
            cache=lambda: (engine.stats.cache.hits, engine.stats.cache.misses),
            ticks=lambda: engine.stats.ticks,
        )

    # ---- what listens ----

    @cached_property
    def _acceptor(self) -> Acceptor:
        config = self._config
        listen = address("listen", config.listen, cache(lambda: credentials(config)))
        return Acceptor(self._new_grpc_server, self._add_services, listen, config.grace_s, starting=self._starting)

    def _new_grpc_server(self) -> grpc.aio.Server:
        open_services = {HEALTH_NAME, reflection.SERVICE_NAME} if self._config.reflection else {HEALTH_NAME}
        interceptor = CallInterceptor(SERVICE_NAME, self._gate, open_services, self._open_calls)
        options = channel_options(self._config, self._max_connections())
        return grpc.aio.server(interceptors=[interceptor], options=options)

    def _add_services(self, server: grpc.aio.Server) -> None:
        service = EmbedService(self._embedder, self._config.stream_stall_s)
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(service, server)
        self._health.add_to(server)
        if self._config.reflection:
            servicer = reflection.aio.ReflectionServicer((SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME))
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]

    def _listeners(self) -> tuple[Listener, ...]:
        """Return what listens beside the acceptor of calls, as far as it is configured."""
        config, found = self._config, list[Listener]()
        if config.health_listen:
            found.append(
                Acceptor(
                    lambda: health_server(OpenInterceptor({HEALTH_NAME})),
                    self._health.add_to,
                    address("health_listen", config.health_listen),
                    config.grace_s,
                    starting=self._starting,
                    line="health alone on",
                )
            )
        if config.ready_listen:
            found.append(ReadinessPort(config.ready_listen, self._health))
        if config.metrics_listen:
            found.append(MetricsExporter(self._metrics.registry, config.metrics_listen))
        return tuple(found)

    def _warn_of_nameless_callers(self) -> None:
        if self._config.callers and not self._config.authenticates:
            _log.warning("callers: no token_file or tls_client_ca is set: callers are anonymous and have every right")


def _labels(model: ServedModel) -> dict[str, str]:
    return {
        "name": model.name,
        "version": model.version,
        "precision": model.precision,
        "backend": model.engine.description.backend,
        "tokenizer": model.tokenizer.name,
    }


def _taken(admission: Admission | StreamAdmission) -> Taken:
    used, limit = admission.used, admission.capacity
    return Taken(used.tokens, limit.tokens, used.response_bytes, limit.response_bytes)


def _gpu(device: torch.device) -> Gpu | None:
    return find_gpu(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else None
