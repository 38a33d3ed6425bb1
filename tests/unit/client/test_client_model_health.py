"""Clients that choose servers by the health of their model: two servers on real sockets, both clients."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from bilm_client import RetryPolicy
from bilm_client.errors import ModelNotFoundError, ServiceError, UnavailableError
from bilm_client.testing import FakeModel
from grpc_health.v1 import health_pb2

from tests.support.scripted import Scripted, running_scripted
from tests.unit.client.conftest import Either

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
MODELS = (FakeModel("en"), FakeModel("de", width=8))
DE = "model:de"

Balanced = Callable[..., Either]


@pytest.fixture
def servers() -> Iterator[tuple[Scripted, Scripted]]:
    with running_scripted() as first, running_scripted() as second:
        for server in (first, second):
            server.service.serve(*MODELS)
        yield first, second


@pytest.fixture(params=["sync", "async"])
def balanced(
    request: pytest.FixtureRequest, servers: tuple[Scripted, Scripted], runner: asyncio.Runner
) -> Iterator[Balanced]:
    """Makes clients of one kind for both servers, and closes them. They name the model "de" and don't retry."""
    clients: list[Either] = []

    def make(model: str = "de") -> Either:
        target = "ipv4:" + ",".join(server.target for server in servers)
        kind = runner if request.param == "async" else None
        retry = RetryPolicy(max_attempts=1)
        clients.append(Either(target, kind, balance="round_robin", model=model, retry=retry))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def calls(servers: tuple[Scripted, Scripted]) -> list[int]:
    return [len(server.service.embed_requests) for server in servers]


def asked(servers: tuple[Scripted, Scripted]) -> int:
    return sum(server.service.get_model_count for server in servers)


@pytest.mark.parametrize("others", [NOT_SERVING, UNKNOWN])
def test_calls_go_where_the_model_is_serving(
    servers: tuple[Scripted, Scripted], balanced: Balanced, others: int
) -> None:
    """Whatever the health of the servers, which is that of their default model."""
    first, second = servers
    first.set_health(NOT_SERVING)
    first.set_health(SERVING, DE)
    second.set_health(others, DE)
    client = balanced()
    for _ in range(10):
        client.embed("a")
        next(client.embed_stream(["a"]))
    assert calls(servers) == [10, 0]
    assert [len(server.service.streams) for server in servers] == [10, 0]
    assert asked(servers) == 1


def test_a_model_that_fails_everywhere_is_unavailable(servers: tuple[Scripted, Scripted], balanced: Balanced) -> None:
    for server in servers:
        server.set_health(NOT_SERVING, DE)
    client = balanced()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            client.embed("a")
        with pytest.raises(UnavailableError):
            next(client.embed_stream(["a"]))
    assert [info.name for info in client.list_models()] == ["en", "de"]
    assert calls(servers) == [0, 0]


@pytest.mark.parametrize("stream_first", [False, True])
def test_servers_of_an_earlier_version_are_chosen_by_their_own_health(
    servers: tuple[Scripted, Scripted], balanced: Balanced, stream_first: bool
) -> None:
    first, second = servers
    for server in servers:
        server.service.serve(FakeModel("de"))
        server.service.model.ClearField("features")
    first.set_health(NOT_SERVING)
    client = balanced()
    if stream_first:
        next(client.embed_stream(["a"]))
    for _ in range(5):
        client.embed("a")
    assert calls(servers) == [0, 5]
    assert second.service.get_model_count == 1  # nothing is asked twice: the first channel is left alone
    next(client.embed_stream(["a"]))
    assert client.health() == "SERVING"


def test_an_unknown_model_is_named_until_it_is_there(servers: tuple[Scripted, Scripted], balanced: Balanced) -> None:
    client = balanced("fr")
    with pytest.raises(ModelNotFoundError, match="expected one of de, en"):
        client.embed("a")
    with pytest.raises(ModelNotFoundError, match="expected one of de, en"):
        next(client.embed_stream(["a"]))
    with pytest.raises(ModelNotFoundError, match="expected one of de, en"):
        client.model_info()
    assert len(client.list_models()) == 2
    first, _ = servers
    first.service.serve(*MODELS, FakeModel("fr"))
    first.set_health(SERVING, "model:fr")
    while outcome(client) is not None:
        pass  # the client sees a change of health a moment after it
    for _ in range(5):
        client.embed("a")
    assert calls(servers) == [6, 0]


def test_a_model_that_is_removed_is_named_too(servers: tuple[Scripted, Scripted], balanced: Balanced) -> None:
    for server in servers:
        server.set_health(SERVING, DE)
    client = balanced()
    client.embed("a")
    for server in servers:
        server.set_health(UNKNOWN, DE)
    while (error := outcome(client)) is None:
        pass  # the client sees a change of health a moment after it
    assert isinstance(error, UnavailableError)
    for server in servers:
        server.service.serve(FakeModel("en"))
    error = outcome(client)
    assert isinstance(error, ModelNotFoundError)
    assert "expected one of en" in str(error)


def outcome(client: Either) -> ServiceError | None:
    """Embed; the error, or None."""
    try:
        client.embed("a")
    except ServiceError as error:
        return error
    return None


def test_closing_ends_both_ways(servers: tuple[Scripted, Scripted], balanced: Balanced) -> None:
    client = balanced("fr")
    with pytest.raises(ModelNotFoundError):
        client.embed("a")
    client.close()
    for call in (client.model_info, client.list_models, client.health):
        with pytest.raises(Exception, match="closed"):
            call()
