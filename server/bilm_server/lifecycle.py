"""The server's life in four verbs: start, serve, drain, stop."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from bilm_server.admission import Admission
from bilm_server.compute import ModelCompute
from bilm_server.config import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, ServerConfig
from bilm_server.health import HealthReporter
from bilm_server.inference import InferenceThread
from bilm_server.interceptors import CallInterceptor
from bilm_server.parts import Parts
from bilm_server.served_model import ServedModel
from bilm_server.service import EmbedService

SERVICE_NAME = embed_pb2.DESCRIPTOR.services_by_name["EmbedService"].full_name

_log = logging.getLogger("bilm_server.lifecycle")

_CONVERSION_THREADS = 2
_MIB = 2**20
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES + _MIB),  # a response is bounded before it is computed
    ("grpc.max_concurrent_streams", 256),
    # A second server on the port must fail, not take half of the connections
    ("grpc.so_reuseport", 0),
    # Connections spread again behind an L4 balancer; the grace is longer than any sensible deadline
    ("grpc.max_connection_age_ms", 300_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
)


class BindError(Exception):
    """The address can't be listened on."""


class Server:
    """A gRPC server on one model."""

    def __init__(self, config: ServerConfig, model: ServedModel) -> None:
        self._config = config
        self._health = HealthReporter(SERVICE_NAME)
        self._parts = Parts(
            config=config,
            model=model,
            inference=InferenceThread(ModelCompute(model.engine), self._health.report),
            conversions=ThreadPoolExecutor(_CONVERSION_THREADS, "conversion"),
            admission=Admission(config.max_waiting_tokens, config.max_waiting_mib * _MIB),
            stream_admission=Admission(config.max_stream_tokens, config.max_stream_mib * _MIB),
        )
        self._grpc: grpc.aio.Server | None = None
        self._stop_asked: asyncio.Event | None = None
        self.target = ""
        """Where clients find the server, once it has started."""

    async def start(self) -> None:
        """Listens at once, NOT_SERVING; SERVING when a warm-up pass has succeeded.

        Raises:
            BindError: if the address can't be listened on.
            Exception: what the warm-up pass raised.
        """
        self._stop_asked = asyncio.Event()
        self._grpc = self._new_grpc_server()
        await self._health.set(False)
        self.target = self._bind(self._grpc)
        await self._grpc.start()
        _log.info("listening on %s", self.target)
        await self._parts.inference.start()
        await self._health.set(True)

    async def serve(self) -> None:
        """Returns when `ask_to_stop` has been called."""
        assert self._stop_asked is not None  # noqa: S101 - start() comes first
        await self._stop_asked.wait()

    def ask_to_stop(self) -> None:
        """Ends `serve`; may be called from a signal handler on the event loop."""
        if self._stop_asked is not None:
            self._stop_asked.set()

    async def drain(self) -> None:
        """NOT_SERVING, time for balancers to notice, then no new calls and time for those in flight."""
        delay_s, grace_s = self._config.drain_delay_s, self._config.grace_s
        _log.info("draining: NOT_SERVING, new calls refused in %g s, calls in flight get %g s more", delay_s, grace_s)
        await self._health.drain()
        await asyncio.sleep(delay_s)
        if self._grpc is not None:
            await self._grpc.stop(grace_s)

    async def stop(self) -> None:
        """Ends everything; idempotent."""
        if self._grpc is not None:
            await self._grpc.stop(0)
        await self._parts.inference.stop()
        self._parts.conversions.shutdown(wait=False, cancel_futures=True)
        _log.info("stopped")

    def _new_grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[CallInterceptor(SERVICE_NAME)], options=_CHANNEL_OPTIONS)
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(EmbedService(self._parts), server)
        self._health.add_to(server)
        if self._config.reflection:
            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection((SERVICE_NAME, health_name, reflection.SERVICE_NAME), server)
        return server

    def _bind(self, server: grpc.aio.Server) -> str:
        listen = self._config.listen
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise BindError(f"listen: can't listen on {listen}") from error
        if listen.startswith("unix:"):
            if not Path(listen.removeprefix("unix:")).exists():
                raise BindError(f"listen: can't listen on {listen}")
            return listen
        return f"{listen.rpartition(':')[0]}:{port}"
