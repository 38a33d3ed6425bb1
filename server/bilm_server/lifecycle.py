"""The server's life in four verbs: start, serve, drain, stop."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
from bilm_server.watchdog import Watchdog

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
    ("grpc.max_connection_age_grace_ms", 600_000),  # longer than any sensible deadline
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
            inference=InferenceThread(ModelCompute(model.engine)),
            conversions=ThreadPoolExecutor(_CONVERSION_THREADS, "conversion"),
            admission=Admission(config.max_waiting_tokens, config.max_waiting_mib * _MIB),
            stream_admission=Admission(config.max_stream_tokens, config.max_stream_mib * _MIB),
        )
        self._grpc: grpc.aio.Server | None = None
        self._stop_asked: asyncio.Event | None = None
        self._watching: asyncio.Task[None] | None = None
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
        await self._health.start()
        self.target = self._bind(self._grpc)
        await self._grpc.start()
        _log.info("listening on %s", self.target)
        await self._parts.inference.start()
        config = self._config
        watchdog = Watchdog(self._parts.inference, config.hang_s, config.give_up_s, self._health.set)
        self._watching = asyncio.create_task(watchdog.run())
        await self._health.set(True)

    async def serve(self) -> None:
        """Returns when `ask_to_stop` has been called.

        Raises:
            EngineLostError: if the engine can't go on in this process.
        """
        assert self._stop_asked is not None and self._watching is not None  # noqa: S101, PT018 - start() comes first
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait({stop_asked, self._watching}, return_when=asyncio.FIRST_COMPLETED)
        stop_asked.cancel()
        if self._watching.done():
            self._watching.result()

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
        if self._watching is not None:
            self._watching.cancel()
        await self._parts.inference.stop()
        self._parts.conversions.shutdown(wait=False, cancel_futures=True)
        _log.info("stopped")

    def _new_grpc_server(self) -> grpc.aio.Server:
        age_ms = round(1000 * self._config.max_connection_age_s)
        options = (*_CHANNEL_OPTIONS, ("grpc.max_connection_age_ms", age_ms))
        interceptor = CallInterceptor(SERVICE_NAME, lambda call, context: nullcontext(), ())
        server = grpc.aio.server(interceptors=[interceptor], options=options)
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
