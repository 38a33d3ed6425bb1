"""Transports over `FakeService`: every call is answered at once, in the calling thread."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from bilm_api.constants import MODEL_HEALTH
from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.settings import Deadline, Settings
from bilm_client._transport.base import Deliver
from bilm_client.errors import ClientClosedError, ended_early, service_error
from bilm_client.results import HealthStatus
from bilm_client.testing.models import FakeModel
from bilm_client.testing.service import CallFailure, FakeService, FakeStream


class FakeTransport:
    """A `SyncTransport` without a network.

    Args:
        models: What is served, the default one first.
        failures: Reason by sentence that shall fail.
        health: The status of every service and every model.
    """

    def __init__(
        self, models: Sequence[FakeModel], failures: Mapping[str, str], health: HealthStatus, _settings: Settings
    ) -> None:
        self.service = FakeService(models, failures)
        self.closed = False
        self._health = health

    def check_open(self) -> None:
        """Raise ClientClosedError if the client is closed."""
        if self.closed:
            raise ClientClosedError("the client is closed")

    def calls(self) -> AbstractContextManager[None]:
        """Do nothing: no call survives into a fork."""
        return nullcontext()

    def embed(self, request: pb.EmbedRequest, _deadline: Deadline) -> pb.EmbedResponse:
        """Answer an Embed."""
        self.check_open()
        with _as_service_errors():
            return self.service.embed(request)

    def start_embed(self, request: pb.EmbedRequest, deadline: Deadline) -> "FakeEmbed":
        """Answer an Embed."""
        return FakeEmbed(self.embed(request, deadline))

    def get_model(self, request: pb.GetModelRequest, _deadline: Deadline) -> pb.GetModelResponse:
        """Answer a GetModel."""
        self.check_open()
        with _as_service_errors():
            return self.service.get_model(request)

    def list_models(self, _deadline: Deadline) -> pb.ListModelsResponse:
        """Answer a ListModels."""
        self.check_open()
        return self.service.list_models()

    def check_health(self, service: str, _deadline: Deadline) -> HealthStatus:
        """Return the status that the constructor was given; SERVICE_UNKNOWN for a model that isn't served."""
        if service.startswith(MODEL_HEALTH) and service.removeprefix(MODEL_HEALTH) not in self.service.models:
            return HealthStatus.SERVICE_UNKNOWN
        return self._health

    def open_stream(
        self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, _deadline: Deadline
    ) -> "FakeConnection":
        """Open a stream, which delivers each result before `send` returns."""
        self.check_open()
        return FakeConnection(self, opening, deliver)

    def wait(self, _timeout_s: float) -> None:
        """Return at once: nothing is tried again."""

    def close(self) -> None:
        """Refuse all further calls."""
        self.closed = True


class FakeAsyncTransport:
    """An `AsyncTransport` without a network; arguments are those of `FakeTransport`."""

    def __init__(
        self, models: Sequence[FakeModel], failures: Mapping[str, str], health: HealthStatus, settings: Settings
    ) -> None:
        self._sync = FakeTransport(models, failures, health, settings)

    def check_open(self) -> None:
        """Raise ClientClosedError if the client is closed."""
        self._sync.check_open()

    async def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        """Answer an Embed."""
        return self._sync.embed(request, deadline)

    async def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse:
        """Answer a GetModel."""
        return self._sync.get_model(request, deadline)

    async def list_models(self, deadline: Deadline) -> pb.ListModelsResponse:
        """Answer a ListModels."""
        return self._sync.list_models(deadline)

    async def check_health(self, service: str, deadline: Deadline) -> HealthStatus:
        """Return the status that the constructor was given; SERVICE_UNKNOWN for a model that isn't served."""
        return self._sync.check_health(service, deadline)

    def open_stream(
        self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, deadline: Deadline
    ) -> "FakeConnection":
        """Open a stream, which delivers each result before `send` returns."""
        return self._sync.open_stream(opening, deliver, deadline)

    async def wait(self, _timeout_s: float) -> None:
        """Return at once: nothing is tried again."""

    async def close(self) -> None:
        """Refuse all further calls."""
        self._sync.close()


class FakeEmbed:
    """A `PendingEmbed` that has its response."""

    def __init__(self, response: pb.EmbedResponse) -> None:
        self._response = response

    def result(self) -> pb.EmbedResponse:
        """Return the response."""
        return self._response

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call back at once."""
        callback()

    def cancel(self) -> None:
        """Do nothing: the call has ended."""


class FakeConnection:
    """A `StreamConnection` to a `FakeService`."""

    def __init__(self, transport: FakeTransport, opening: list[pb.EmbedStreamRequest], deliver: Deliver) -> None:
        self._transport = transport
        self._deliver = deliver
        self._stream: FakeStream | None = None
        try:
            self._stream = FakeStream(transport.service, opening[0].start)
        except CallFailure as failure:
            deliver(service_error(failure))
        for request in opening[1:]:
            self.send(request)

    def send(self, request: pb.EmbedStreamRequest) -> None:
        """Deliver the result of an item."""
        if self._transport.closed:
            self._deliver(ClientClosedError("the client was closed during the call"))
        elif self._stream is not None:  # else the call has ended
            self._deliver(self._stream.answer(request.item))

    def half_close(self) -> None:
        """Deliver the end of the stream."""
        if self._stream is not None:
            self._deliver(ended_early())

    def close(self) -> None:
        """Do nothing: there is no call to cancel."""


@contextmanager
def _as_service_errors() -> Iterator[None]:
    try:
        yield
    except CallFailure as failure:
        raise service_error(failure) from failure
