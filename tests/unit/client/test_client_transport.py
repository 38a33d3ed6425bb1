"""Clients over a transport that the test hands in."""

import grpc
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.settings import Deadline, Settings
from bilm_client.aio import AsyncTransportClient
from bilm_client.client import TransportClient
from bilm_client.errors import ModelVersionError, ServiceError, UnavailableError
from bilm_client.results import HealthStatus
from bilm_client.testing.models import FakeModel
from bilm_client.testing.transport import FakeAsyncTransport, FakeTransport

SETTINGS = Settings(target="nowhere")
# after another version the limits may be others, too
CASES = [(ModelVersionError("other", code=grpc.StatusCode.FAILED_PRECONDITION), 2), (UnavailableError("away"), 1)]


class Failing(FakeTransport):
    """Fails each Embed, and counts GetModel."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__([FakeModel()], {}, HealthStatus.SERVING, SETTINGS)
        self.error = error
        self.get_model_count = 0

    def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse:
        self.get_model_count += 1
        return super().get_model(request, deadline)

    def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        raise self.error


class AsyncFailing(FakeAsyncTransport):
    """The same, with awaits."""

    def __init__(self, failing: Failing) -> None:
        super().__init__([FakeModel()], {}, HealthStatus.SERVING, SETTINGS)
        self.failing = failing

    async def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse:
        return self.failing.get_model(request, deadline)

    async def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        return self.failing.embed(request, deadline)


@pytest.mark.parametrize(("error", "expected"), CASES)
def test_the_model_is_asked_for_anew_after_another_version(error: ServiceError, expected: int) -> None:
    failing = Failing(error)
    client = TransportClient(SETTINGS, lambda _settings: failing)
    for _ in range(2):
        with pytest.raises(type(error)):
            client.embed("a")
    assert failing.get_model_count == expected


@pytest.mark.parametrize(("error", "expected"), CASES)
async def test_the_model_is_asked_for_anew_with_awaits_too(error: ServiceError, expected: int) -> None:
    failing = Failing(error)
    client = AsyncTransportClient(SETTINGS, lambda _settings: AsyncFailing(failing))
    for _ in range(2):
        with pytest.raises(type(error)):
            await client.embed("a")
    assert failing.get_model_count == expected
