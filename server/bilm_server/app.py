"""The composition root: builds each part of a server once, and hands each what it needs.

What needs the model is in `model_parts`, which the thread that loads the model imports: torch takes longer than all
that is needed to listen.
"""

import asyncio
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from ssl import SSLContext
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import Reason
from bilm_api.inference import open_inference_pb2
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_model.errors import ModelError
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2

from bilm_server.config import ServerConfig
from bilm_server.embedding.admission import Admission, StreamAdmission
from bilm_server.embedding.call_gate import CallGate
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.conversions import Conversions
from bilm_server.errors import ConfigurationError, RefusalError
from bilm_server.inference.load import LoadMeter
from bilm_server.lifecycle import DrainTimes, Listener, LoadedParts, Server
from bilm_server.observability.access_log import AccessLog
from bilm_server.observability.call_record import CallObserver
from bilm_server.observability.metrics import Metrics
from bilm_server.observability.no_log_calls import NoLogCalls
from bilm_server.observability.resources import Gpu
from bilm_server.observability.server_metrics import (
    NO_DROPS,
    DropCounts,
    EngineView,
    ServerCollector,
    ServerView,
    Taken,
)
from bilm_server.preflight import ServingPlan, plan_serving
from bilm_server.protocols.embed_v1.admin import AdminService
from bilm_server.protocols.grpc.acceptor import Acceptor
from bilm_server.protocols.grpc.connections import connection_limit, health_server, http_share
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.grpc.interceptors import CallInterceptor, OpenCalls, OpenInterceptor
from bilm_server.protocols.grpc.late_service import RETRY_AFTER_MS, LateService
from bilm_server.protocols.grpc.listening import address, channel_options, credentials
from bilm_server.protocols.grpc.load_report import Trailer, load_trailer
from bilm_server.protocols.http import names as http
from bilm_server.protocols.kserve import methods as kserve
from bilm_server.protocols.kserve.readiness import ReadinessService
from bilm_server.protocols.ops.metrics_endpoint import MetricsExporter
from bilm_server.protocols.ops.readiness_port import ReadinessPort
from bilm_server.security.auth import Authenticator
from bilm_server.security.callers import CallerRights
from bilm_server.security.tls import server_contexts

if TYPE_CHECKING:
    from bilm_server.embedding.model_set import Changes, ModelSet
    from bilm_server.observability.tracing import Tracing
    from bilm_server.protocols.http.door import HttpDoor
    from bilm_server.served_model import ServedModel

_SERVICE = embed_pb2.DESCRIPTOR.services_by_name["EmbedService"]
SERVICE_NAME = _SERVICE.full_name
_REFLECTION_NAME = "grpc.reflection.v1alpha.ServerReflection"
HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_log = logging.getLogger(__name__)

_MIB = 2**20

_RELOADED = ("models", "model", "options", "served_model_name", "callers")
"""Settings that a reload reads again."""
_EXPECTED = (ConfigurationError, ModelError, RefusalError, OSError)
"""What a configuration can cause; all else is logged with its traceback."""


def build_server(
    config: ServerConfig,
    plan: ServingPlan,
    load_model: "Callable[[ServerConfig], ServedModel]",
    drops: DropCounts = NO_DROPS,
    read_config: Callable[[], ServerConfig] | None = None,
) -> Server:
    """Return a server that has not started.

    Nothing is listened on, and no file is read, before `Server.start`.

    Args:
        config: all settings.
        plan: what will be served.
        load_model: loads a model that a configuration names alone; called by `Server.load`, in a thread.
        drops: log lines and alerts lost by the process, for the metrics.
        read_config: returns all settings as they are now; None: they never change.

    Raises:
        ConfigurationError: if traces or HTTP are configured and what they need isn't installed.
    """
    return _App(config, plan, load_model, drops, read_config or (lambda: config)).server


class _App:
    """Each part of one server, built when the first other part needs it."""

    def __init__(
        self,
        config: ServerConfig,
        plan: ServingPlan,
        load_model: "Callable[[ServerConfig], ServedModel]",
        drops: DropCounts,
        read_config: Callable[[], ServerConfig],
    ) -> None:
        self._config, self._plan, self._load_model, self._drops = config, plan, load_model, drops
        self._read_config = read_config
        self._max_connections = cache(lambda: connection_limit(config.max_connections))
        self._starting, self._reloading = asyncio.Lock(), asyncio.Lock()
        self._has_named_models = bool(config.models)
        self._open_calls = OpenCalls()
        self._metrics = Metrics(plan.names, _infer_methods(config))
        self._health = HealthReporter(SERVICE_NAME, plan.names)
        self._rights = CallerRights(config.callers, config.authenticates)
        self._no_log_calls = NoLogCalls(self._rights)
        self._authenticator = Authenticator(config.token_file)
        self._conversions = Conversions()
        self._admission = Admission(config.max_waiting_tokens, config.max_waiting_mib * _MIB)
        self._stream_admission = StreamAdmission(config.max_stream_tokens, config.max_stream_mib * _MIB)
        self._service = LateService(SERVICE_NAME, _SERVICE.methods_by_name)
        self._kserve = LateService(kserve.SERVICE_NAME, kserve.MODEL_METHODS) if config.kserve else None
        self._models: ModelSet | None = None
        self._engine_views: Callable[[], Sequence[EngineView]] = tuple
        self._gpu: Gpu | None = None
        self._load_meter = LoadMeter() if config.load_reports else None

    @cached_property
    def server(self) -> Server:
        config = self._config
        self._metrics.registry.register(ServerCollector(self._view))
        return Server(
            self._health,
            self._acceptor,
            self._listeners(),
            self._load,
            open_calls=self._open_calls,
            drain_times=DrainTimes(config.drain_delay_s, config.grace_s),
            doors=() if self._http is None else (self._http,),
            reload=self._reload,
            prepare=(self._authenticator.load, self._warn_of_nameless_callers, self._grpc_connections),
            close=(self._conversions.stop, *(() if self._tracing is None else (self._tracing.stop,))),
        )

    @cached_property
    def _caller_limits(self) -> CallerLimits:
        config = self._config
        return CallerLimits(config.caller_tokens_per_s, config.caller_max_calls, config.max_tokens_per_request)

    def _load(self) -> LoadedParts:
        """Load the models and build what needs them; in the thread that loads."""
        from bilm_server.model_parts import SharedParts, build_parts, engine_views, gpu_of  # noqa: PLC0415 - torch

        shared = SharedParts(
            self._conversions,
            self._admission,
            self._stream_admission,
            self._caller_limits,
            self._metrics,
            self._health.set,
            self._service,
            self._load_meter,
            self._kserve,
            None if self._http is None else self._http.app,
        )
        parts = build_parts(self._config, self._plan, self._load_model, shared)
        self._models, self._gpu = parts.models, gpu_of(self._config)
        self._engine_views = lambda: engine_views(parts.models.models, lambda: parts.watchdog.stalled_s)
        return parts

    async def _reload(self) -> "Changes":
        """Serve the models, and know the callers, that the configuration has now.

        Raises:
            RefusalError: MODEL_LOADING, or RELOAD_FAILED; then nothing has changed.
        """
        if self._models is None or not self._models.models:
            raise RefusalError(Reason.MODEL_LOADING, "the first models are being loaded; try again", RETRY_AFTER_MS)
        async with self._reloading:  # from reading to the end: a later one has the later configuration
            try:
                config = await asyncio.to_thread(self._present_config)
                changes = await self._models.reload(await asyncio.to_thread(plan_serving, config))
            except Exception as error:
                _log.error("reload: nothing has changed: %s", error, exc_info=not isinstance(error, _EXPECTED))
                raise RefusalError(Reason.RELOAD_FAILED, f"nothing has changed: {error}") from error
            self._has_named_models = bool(config.models)
            self._rights.replace(config.callers)
            self._health.set(self._models.health())
            _log.info(
                "reloaded: %s",
                ", ".join(f"{what} {' '.join(names) or 'none'}" for what, names in dataclasses.asdict(changes).items()),
            )
            return changes

    def _present_config(self) -> ServerConfig:
        """Return the server's settings with what a reload reads again as it is now.

        Raises:
            ConfigurationError: if that can't be read, or has lost its models, as a file does that is being written.
        """
        found = self._read_config()
        if self._has_named_models and not (found.models or found.model):
            raise ConfigurationError("models: the configuration names none any more")
        return self._config.model_copy(update={name: getattr(found, name) for name in _RELOADED})

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
        tracing = self._tracing
        return ServerView(
            engines=lambda: self._engine_views(),  # noqa: PLW0108 - it is replaced
            max_connections=self._max_connections,
            serving=lambda: self._health.serving,
            admitted=lambda: {"unary": _taken(self._admission), "stream": _taken(self._stream_admission)},
            drops=self._drops,
            no_log_calls=lambda: self._no_log_calls.counts,
            spans_failed=lambda: 0 if tracing is None else tracing.failed,
            gpu=lambda: self._gpu,
        )

    # ---- what listens ----

    @cached_property
    def _acceptor(self) -> Acceptor:
        config = self._config
        listen = address("listen", config.listen, cache(lambda: credentials(config)))
        return Acceptor(self._new_grpc_server, self._add_services, listen, config.grace_s, starting=self._starting)

    def _new_grpc_server(self) -> grpc.aio.Server:
        open_names = {HEALTH_NAME}
        if self._config.reflection:
            open_names.add(_REFLECTION_NAME)
        if self._config.kserve:
            open_names.update(f"{kserve.SERVICE_NAME}/{method}" for method in kserve.OPEN_METHODS)
        interceptor = CallInterceptor(SERVICE_NAME, self._gate, open_names, self._open_calls, self._trailer)
        options = channel_options(self._config, self._grpc_connections())
        return grpc.aio.server(interceptors=[interceptor], options=options)

    @property
    def _trailer(self) -> Callable[[], Trailer] | None:
        meter = self._load_meter
        return None if meter is None else lambda: load_trailer(meter.load(time.monotonic()))

    def _add_services(self, server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((self._service,))
        if self._config.authenticates:
            embed_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(self.server.reload, self._rights), server)
        self._health.add_to(server)
        if self._kserve is not None:
            readiness = ReadinessService(self._health, self._has_model)
            server.add_generic_rpc_handlers((kserve.handler_of(readiness, kserve.OPEN_METHODS), self._kserve))
        if self._config.reflection:
            self._add_reflection(server)

    def _has_model(self, name: str, version: str) -> bool:
        """Return whether a model is loaded that calls with this name and version find."""
        return self._models is not None and self._models.registry.has(name, version)

    def _add_reflection(self, server: grpc.aio.Server) -> None:
        """Register reflection of all services."""
        from grpc_reflection.v1alpha import (  # noqa: PLC0415 - only where asked for
            reflection,
            reflection_pb2,
            reflection_pb2_grpc,
        )

        files: dict[str, Any] = {  # what stubs call a FileDescriptor depends on who made them
            SERVICE_NAME: embed_pb2.DESCRIPTOR,
            HEALTH_NAME: health_pb2.DESCRIPTOR,
            _REFLECTION_NAME: reflection_pb2.DESCRIPTOR,
        }
        if self._kserve is not None:
            files[kserve.SERVICE_NAME] = open_inference_pb2.DESCRIPTOR
        servicer = reflection.aio.ReflectionServicer(tuple(files), pool=_pool_of(files.values()))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]

    def _grpc_connections(self) -> int:
        total = self._max_connections()
        return total - self._http_connections() if self._config.http_listen else total

    def _http_connections(self) -> int:
        return http_share(self._max_connections())

    @cached_property
    def _http(self) -> "HttpDoor | None":
        config = self._config
        if not config.http_listen:
            return None
        from bilm_server.protocols.http.door import HttpDoor  # noqa: PLC0415 - uvicorn is an extra
        from bilm_server.protocols.http.metrics_page import MetricsPage  # noqa: PLC0415
        from bilm_server.protocols.http.openapi import OpenApi  # noqa: PLC0415
        from bilm_server.protocols.http.page_files import page_files  # noqa: PLC0415
        from bilm_server.protocols.http.routing import HttpApp  # noqa: PLC0415

        app = HttpApp(
            self._gate,
            lambda: self._health.serving,
            config.http_host,
            config.stream_stall_s,
            endpoints={http.METRICS: MetricsPage(self._metrics.registry), http.OPENAPI: OpenApi()},
            page=page_files(),
        )
        return HttpDoor(config.http_listen, app, self._http_connections, self._tls_contexts)

    def _tls_contexts(self) -> Callable[[], SSLContext] | None:
        config = self._config
        if config.tls_cert is None or config.tls_key is None:
            return None
        return server_contexts(config.tls_cert, config.tls_key, config.tls_client_ca)

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
            _log.warning(
                "callers: no token_file or tls_client_ca is set: callers are anonymous, have every right and no ceiling"
            )


def _pool_of(files: Iterable[Any]) -> DescriptorPool:
    """Return a pool with these files, which have pools of their own, and with what they import."""
    pool = DescriptorPool()
    added: set[str] = set()

    def add(file: Any) -> None:
        if file.name not in added:
            added.add(file.name)
            for imported in file.dependencies:
                add(imported)
            pool.AddSerializedFile(file.serialized_pb)

    for file in files:
        add(file)
    return pool


def _infer_methods(config: ServerConfig) -> tuple[str, ...]:
    """Return the names of other protocols' methods that embed."""
    return (*((kserve.INFER_METHOD,) if config.kserve else ()), *(http.INFER_METHODS if config.http_listen else ()))


def _taken(admission: Admission | StreamAdmission) -> Taken:
    used, limit = admission.used, admission.capacity
    return Taken(used.tokens, limit.tokens, used.response_bytes, limit.response_bytes, admission.batch_tokens)
