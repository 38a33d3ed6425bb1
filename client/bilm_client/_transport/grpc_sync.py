"""gRPC's synchronous API as a transport."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2 as pb
from grpc_health.v1 import health_pb2

from bilm_client._core.settings import Deadline, Settings
from bilm_client._transport.base import Deliver
from bilm_client._transport.channels import sync_channel
from bilm_client._transport.connection import GrpcConnection
from bilm_client._transport.forks import FORK_GATE
from bilm_client._transport.grpc_common import call_arguments, failed_health_status, health_status
from bilm_client._transport.link import Link
from bilm_client.errors import BilmError, ClientClosedError, ServiceError, service_error
from bilm_client.results import HealthStatus


class GrpcSyncTransport:
    """A `SyncTransport`. The channel opens with the first call; a forked process opens its own.

    Where servers are chosen by the health of the model and none reports it, a second channel, for which any server will
    do, says why: see `get_model`.

    Args:
        settings: The client's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._links: dict[tuple[int, bool], Link] = {}  # by process, and by whether it watches the model

    def check_open(self) -> None:
        """Raise ClientClosedError if the client is closed."""
        self._link.check_open()

    def calls(self) -> AbstractContextManager[None]:
        """Hold off forks for as long as the context lasts."""
        return FORK_GATE.call()

    def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        """Call Embed. gRPC waits in this thread: no other thread is woken for the response."""
        response: pb.EmbedResponse = self._unary(self._link.stub().Embed, request, deadline)
        return response

    def start_embed(self, request: pb.EmbedRequest, deadline: Deadline) -> "FutureEmbed":
        """Start an Embed call."""
        method = self._link.stub().Embed
        try:
            call = method.future(request, **call_arguments(self._settings, deadline))
        except ValueError as error:
            raise self._translated(error) from error
        return FutureEmbed(call, self._translated)

    def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse:
        """Call GetModel. Where no server reports the model, ask any of them.

        One that has the model and names no features is of an earlier version, without a health for models: from then
        on, the health of servers as a whole decides. On any other the model isn't SERVING, which is the error.
        """
        with FORK_GATE.call():
            try:
                response: pb.GetModelResponse = self._unary(self._link.stub().GetModel, request, deadline)
            except ServiceError as error:
                if not self._settings.may_lack_model(error):
                    raise
                any_server = self._settings.watching_servers()
                response = self._unary(self._link_of(any_server).stub().GetModel, request, deadline)
                if response.features:
                    raise
                self._settings = any_server
        return response

    def list_models(self, deadline: Deadline) -> pb.ListModelsResponse:
        """Call ListModels, of any server where none reports the client's own model."""
        request = pb.ListModelsRequest()
        with FORK_GATE.call():
            try:
                response: pb.ListModelsResponse = self._unary(self._link.stub().ListModels, request, deadline)
            except ServiceError as error:
                if not self._settings.may_lack_model(error):
                    raise
                link = self._link_of(self._settings.watching_servers())
                response = self._unary(link.stub().ListModels, request, deadline)
        return response

    def check_health(self, service: str, deadline: Deadline) -> HealthStatus:
        """Call the health service."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            with FORK_GATE.call():
                return health_status(self._unary(self._link.health_stub().Check, request, deadline))
        except ServiceError as error:
            return failed_health_status(error)

    def open_stream(self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, deadline: Deadline) -> GrpcConnection:
        """Start an EmbedStream call."""

        def connect(requests: Iterator[pb.EmbedStreamRequest]) -> Any:
            try:
                return self._link.stub().EmbedStream(requests, **call_arguments(self._settings, deadline))
            except ValueError as error:
                raise self._translated(error) from error

        return GrpcConnection(connect, self._translated, opening, deliver)

    def wait(self, timeout_s: float) -> None:
        """Wait so long, or until the client is closed."""
        self._link.wait(timeout_s)

    def close(self) -> None:
        """Close the channel and end the calls under way."""
        self._link.close()
        for (process_id, _), link in tuple(self._links.items()):
            if process_id == os.getpid():
                link.close()

    def _unary(self, method: Any, request: Any, deadline: Deadline) -> Any:
        try:
            return method(request, **call_arguments(self._settings, deadline))
        except (grpc.RpcError, ValueError) as error:
            raise self._translated(error) from error

    @property
    def _link(self) -> Link:
        """The link of the calling process; a fork takes its own and leaves its parent's locks and calls alone."""
        return self._link_of(self._settings)

    def _link_of(self, settings: Settings) -> Link:
        key = os.getpid(), settings.watches_model
        link = self._links.get(key)
        if link is None:
            closed = any(other.is_closed for other in tuple(self._links.values()))
            link = self._links.setdefault(key, Link(lambda: sync_channel(settings), closed))  # atomic: threads agree
        return link

    def _translated(self, error: Any) -> BilmError:
        """Return the package's error for a call, gRPC's error, or the ValueError of a channel that is closed."""
        if self._link.is_closed:
            return ClientClosedError("the client was closed during the call")
        if isinstance(error, ValueError):
            raise error
        return service_error(error)


class FutureEmbed:
    """A `PendingEmbed` over gRPC's future."""

    def __init__(self, call: Any, translate: Callable[[Any], BilmError]) -> None:
        self._call = call
        self._translate = translate

    def result(self) -> pb.EmbedResponse:
        """Wait for the response."""
        try:
            response: pb.EmbedResponse = self._call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._translate(self._call) from error  # FutureCancelledError has no status; its call has
        except BaseException:
            self._call.cancel()
            raise
        return response

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call back in gRPC's thread, or at once where the call has ended."""
        self._call.add_done_callback(lambda _call: callback())

    def cancel(self) -> None:
        """Cancel the call."""
        self._call.cancel()
