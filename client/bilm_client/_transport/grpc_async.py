"""gRPC's asynchronous API as a transport. Streams use a synchronous channel, which `connection` explains."""

import asyncio
import os
import weakref
from collections.abc import Iterator
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bilm_client._core.settings import Deadline, Settings
from bilm_client._transport.base import Deliver
from bilm_client._transport.channels import async_channel, sync_channel
from bilm_client._transport.connection import GrpcConnection
from bilm_client._transport.grpc_common import call_arguments, failed_health_status, health_status
from bilm_client.errors import BilmError, ClientClosedError, ForkedError, ServiceError, service_error
from bilm_client.results import HealthStatus


class GrpcAsyncTransport:
    """An `AsyncTransport`. The channel opens with the first call and belongs to that call's loop.

    Where servers are chosen by the health of the model and none reports it, a second channel, for which any server will
    do, says why: see `get_model`.

    Args:
        settings: The client's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process_id = 0  # that opened the channel; 0: none has
        self._closed = False
        self._channels: dict[bool, grpc.aio.Channel] = {}  # by whether it watches the model; of streams, too
        self._stream_channels: dict[bool, grpc.Channel] = {}
        self._embed_stub: embed_pb2_grpc.EmbedServiceAsyncStub | None = None

    def check_open(self) -> None:
        """Raise ClientClosedError if the client is closed, ForkedError where gRPC doesn't work."""
        if self._closed:
            raise ClientClosedError("the client is closed")
        if _CHANNELS.inherited or self._process_id not in (0, os.getpid()):
            raise ForkedError(
                "this process was forked while an AsyncClient was open, so gRPC's asynchronous side doesn't work here: "
                "use Client, start the process by 'spawn', or close every AsyncClient before the fork"
            )

    async def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        """Call Embed."""
        response: pb.EmbedResponse = await self._unary(self._stub().Embed, request, deadline)
        return response

    async def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse:
        """Call GetModel. Where no server reports the model, ask any of them.

        One that has the model and names no features is of an earlier version, without a health for models: from then
        on, the health of servers as a whole decides. On any other the model isn't SERVING, which is the error.
        """
        try:
            response: pb.GetModelResponse = await self._unary(self._stub().GetModel, request, deadline)
        except ServiceError as error:
            if not self._settings.may_lack_model(error):
                raise
            any_server = self._settings.watching_servers()
            stub = embed_pb2_grpc.EmbedServiceStub(self._open_channel(any_server))
            response = await self._unary(stub.GetModel, request, deadline)
            if response.features:
                raise
            self._settings, self._embed_stub = any_server, None
        return response

    async def list_models(self, deadline: Deadline) -> pb.ListModelsResponse:
        """Call ListModels, of any server where none reports the client's own model."""
        request = pb.ListModelsRequest()
        try:
            response: pb.ListModelsResponse = await self._unary(self._stub().ListModels, request, deadline)
        except ServiceError as error:
            if not self._settings.may_lack_model(error):
                raise
            stub = embed_pb2_grpc.EmbedServiceStub(self._open_channel(self._settings.watching_servers()))
            response = await self._unary(stub.ListModels, request, deadline)
        return response

    async def check_health(self, service: str, deadline: Deadline) -> HealthStatus:
        """Call the health service."""
        stub: Any = health_pb2_grpc.HealthStub(self._open_channel(self._settings))
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            return health_status(await self._unary(stub.Check, request, deadline))
        except ServiceError as error:
            return failed_health_status(error)

    def open_stream(self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, deadline: Deadline) -> GrpcConnection:
        """Start an EmbedStream call."""

        def connect(requests: Iterator[pb.EmbedStreamRequest]) -> Any:
            try:
                return self._stream_stub().EmbedStream(requests, **call_arguments(self._settings, deadline))
            except ValueError as error:
                raise self._translated(error) from error

        return GrpcConnection(connect, self._translated, opening, deliver)

    async def wait(self, timeout_s: float) -> None:
        """Sleep."""
        await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        """Close the channels and end the calls under way."""
        if self._process_id not in (0, os.getpid()):
            return  # the channel is the parent's
        self._closed = True
        stream_channels, self._stream_channels = self._stream_channels, {}
        for stream_channel in stream_channels.values():
            stream_channel.close()
        channels, self._channels, self._embed_stub = self._channels, {}, None
        for channel in channels.values():
            await channel.close()

    async def _unary(self, method: Any, request: Any, deadline: Deadline) -> Any:
        try:
            call = method(request, **call_arguments(self._settings, deadline))
            return await call
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            raise self._translated(error) from error
        except asyncio.CancelledError:
            # gRPC raises this for a call that ended CANCELLED as well as for a task that is being cancelled.
            if _is_being_cancelled():
                raise
            raise self._translated(await _finished_call(call)) from None

    def _stub(self) -> "embed_pb2_grpc.EmbedServiceAsyncStub":
        self.check_open()
        if self._embed_stub is None:
            self._embed_stub = embed_pb2_grpc.EmbedServiceStub(self._open_channel(self._settings))
        return self._embed_stub

    def _stream_stub(self) -> embed_pb2_grpc.EmbedServiceStub:
        # gRPC lets this channel share the other one's connection.
        self.check_open()
        channel = self._stream_channels.get(self._settings.watches_model)
        if channel is None:
            self._process_id = os.getpid()
            channel = self._stream_channels[self._settings.watches_model] = sync_channel(self._settings)
        return embed_pb2_grpc.EmbedServiceStub(channel)

    def _open_channel(self, settings: Settings) -> grpc.aio.Channel:
        self.check_open()
        channel = self._channels.get(settings.watches_model)
        if channel is None:
            self._process_id = os.getpid()
            channel = self._channels[settings.watches_model] = async_channel(settings)
            _CHANNELS.add(channel)
        return channel

    def _translated(self, error: Any) -> BilmError:
        """Return the package's error for gRPC's, which is UsageError or ValueError where the channel is closed."""
        if self._closed:
            return ClientClosedError("the client was closed during the call")
        if isinstance(error, grpc.aio.UsageError | ValueError):
            raise error
        return service_error(error)


class AsyncChannels:
    """The asynchronous channels that are open.

    Attributes:
        inherited: Whether some were at the fork that made this process.
    """

    def __init__(self) -> None:
        self.inherited = False
        self._open: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()

    def add(self, channel: grpc.aio.Channel) -> None:
        """Count a channel for as long as it exists."""
        self._open.add(channel)

    def after_fork(self) -> None:
        """Record, in the child process, whether it has inherited channels."""
        self.inherited = self.inherited or len(self._open) > 0


_CHANNELS = AsyncChannels()
os.register_at_fork(after_in_child=_CHANNELS.after_fork)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _finished_call(call: Any) -> grpc.aio.AioRpcError:
    """Return the error of a call that has ended."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )
