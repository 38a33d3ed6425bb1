"""The server's life in four verbs: start, serve, drain, stop."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from bilm_server.acceptor import Acceptor
from bilm_server.admission import Admission
from bilm_server.auth import Authenticator
from bilm_server.caller_limits import CallerLimits
from bilm_server.callers import CallerRights, Right
from bilm_server.calls import CallRecord, is_marked
from bilm_server.compute import ModelCompute
from bilm_server.config import ServerConfig, split_address
from bilm_server.conversions import Conversions
from bilm_server.descriptors import connection_limit, health_server
from bilm_server.health import HealthReporter
from bilm_server.inference import InferenceThread
from bilm_server.interceptors import CallInterceptor, OpenCalls, OpenInterceptor
from bilm_server.listening import BindError, address, channel_options, credentials
from bilm_server.monitoring import NO_LOSSES, Losses, Monitoring
from bilm_server.parts import Parts
from bilm_server.ready_port import ReadyPort
from bilm_server.served_model import ServedModel
from bilm_server.service import EmbedService
from bilm_server.stream_room import StreamRoom
from bilm_server.watchdog import Watchdog

SERVICE_NAME = embed_pb2.DESCRIPTOR.services_by_name["EmbedService"].full_name
HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_log = logging.getLogger("bilm_server.lifecycle")

_MIB = 2**20


class Server:
    """A gRPC server on one model."""

    def __init__(self, config: ServerConfig, model: ServedModel, losses: Losses = NO_LOSSES) -> None:
        """Puts the parts together.

        Args:
            config: everything that was chosen.
            model: what to serve.
            losses: of log lines and alerts, for the metrics.

        Raises:
            ConfigurationError: if something is wanted that isn't installed.
        """
        self._config = config
        self._health = HealthReporter(SERVICE_NAME)
        self._rights = CallerRights(config.callers, config.authenticates)
        self._monitoring = Monitoring(config, SERVICE_NAME, losses, self._rights)
        self._parts = _parts(config, model, self._monitoring)
        inference = self._parts.inference
        self._watchdog = Watchdog(inference, config.hang_s, config.give_up_s, self._health.set)
        self._authenticator = Authenticator(config.token_file)
        self._ready_port = ReadyPort(*split_address(config.ready_listen)) if config.ready_listen else None
        self._starting = asyncio.Lock()
        self._open_calls = OpenCalls()
        self._acceptor: Acceptor | None = None
        self._health_acceptor: Acceptor | None = None
        self._stop_asked = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @property
    def target(self) -> str:
        """Where clients find the server, once it has started."""
        return "" if self._acceptor is None else self._acceptor.target

    async def start(self) -> None:
        """Listens at once, NOT_SERVING; SERVING when a warm-up pass has succeeded.

        Raises:
            BindError: if an address can't be listened on.
            ConfigurationError: if files for TLS or tokens are bad, or more connections are asked for than fit.
            Exception: what the warm-up pass raised.
        """
        self._authenticator.load()
        if self._config.callers and not self._config.authenticates:
            _log.warning("callers: without token_file or tls_client_ca nobody has a name, and everybody every right")
        max_connections = connection_limit(self._config.max_connections)
        self._monitoring.observe(self._parts, self._health, self._watchdog, max_connections)
        await self._listen(max_connections)
        await self._parts.inference.start()
        self._watchdog.look()  # nothing but the watchdog reports to health
        self._watching = asyncio.create_task(self._watchdog.run())

    async def serve(self) -> None:
        """Returns when `ask_to_stop` has been called.

        Raises:
            EngineLostError: if the engine can't go on in this process.
            BindError: if nothing listens any more.
        """
        assert self._watching and self._acceptor  # noqa: S101, PT018 - start() comes first
        ends = [asyncio.create_task(event.wait()) for event in (self._stop_asked, self._acceptor.lost)]
        await asyncio.wait({*ends, self._watching}, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if self._watching.done():
            self._watching.result()
        if self._acceptor.lost.is_set():
            raise BindError(f"listen: can't listen on {self.target} any more")

    def ask_to_stop(self) -> None:
        """Ends `serve`; may be called from a signal handler on the event loop."""
        self._stop_asked.set()

    async def drain(self) -> None:
        """NOT_SERVING, time for balancers to notice, then no new calls and time for those in flight."""
        delay_s, grace_s = self._config.drain_delay_s, self._config.grace_s
        _log.info("draining: NOT_SERVING, new calls refused in %g s, calls in flight get %g s more", delay_s, grace_s)
        self._health.drain()
        await asyncio.sleep(delay_s)
        self._open_calls.end()  # a health watcher would hold the drain for all of the grace time
        if self._acceptor is not None:
            await self._acceptor.stop(grace_s)

    async def stop(self) -> None:
        """Ends everything; idempotent."""
        for server in (self._acceptor, self._health_acceptor):
            if server is not None:
                await server.stop(0)
        if self._watching is not None:
            self._watching.cancel()
        if self._ready_port is not None:
            await self._ready_port.stop()
        await self._parts.inference.stop()
        self._parts.conversions.stop()
        await self._monitoring.stop()
        _log.info("stopped")

    async def _listen(self, max_connections: int) -> None:
        grace_s, tls = self._config.grace_s, credentials(self._config)
        self._acceptor = Acceptor(
            lambda: self._new_grpc_server(max_connections),
            self._add_services,
            address("listen", self._config.listen, tls),
            grace_s,
            self._starting,
        )
        await self._acceptor.start()
        _log.info("listening on %s", self.target)
        if listen := self._config.health_listen:
            self._health_acceptor = Acceptor(
                lambda: health_server(OpenInterceptor({HEALTH_NAME})),
                self._health.add_to,
                address("health_listen", listen),
                grace_s,
                self._starting,
            )
            await self._health_acceptor.start()
            _log.info("health alone on %s", self._health_acceptor.target)
        if self._ready_port is not None:
            with _bind_errors("ready_listen", self._config.ready_listen):
                await self._ready_port.start(self._health)
        with _bind_errors("metrics_listen", self._config.metrics_listen):
            if found := self._monitoring.start():
                _log.info("metrics on http://%s/metrics", found)

    def _new_grpc_server(self, max_connections: int) -> grpc.aio.Server:
        open_services = {HEALTH_NAME, reflection.SERVICE_NAME} if self._config.reflection else {HEALTH_NAME}
        interceptor = CallInterceptor(
            SERVICE_NAME, self._gate, self._monitoring.observers, open_services, self._open_calls
        )
        options = channel_options(self._config, max_connections)
        return grpc.aio.server(interceptors=[interceptor], options=options)

    def _add_services(self, server: grpc.aio.Server) -> None:
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(EmbedService(self._parts), server)
        self._health.add_to(server)
        if self._config.reflection:
            servicer = reflection.aio.ReflectionServicer((SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME))
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]

    def _gate(self, call: CallRecord, context: "grpc.aio.ServicerContext[Any, Any]") -> AbstractContextManager[None]:
        call.caller = self._authenticator.identify(call.metadata, call.peer, context.auth_context()).name
        call.is_test = is_marked(call.metadata) and self._rights.has(call.caller, Right.NO_LOG)
        return self._parts.caller_limits.call(call.caller)


def _parts(config: ServerConfig, model: ServedModel, monitoring: Monitoring) -> Parts:
    return Parts(
        config=config,
        model=model,
        inference=InferenceThread(ModelCompute(model.engine), monitoring.on_round),
        conversions=Conversions(),
        admission=Admission(config.max_waiting_tokens, config.max_waiting_mib * _MIB),
        stream_admission=StreamRoom(config.max_stream_tokens, config.max_stream_mib * _MIB),
        caller_limits=CallerLimits(config.caller_tokens_per_s, config.caller_max_calls, config.max_tokens_per_request),
    )


@contextmanager
def _bind_errors(name: str, listen: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BindError(f"{name}: can't listen on {listen}") from error
