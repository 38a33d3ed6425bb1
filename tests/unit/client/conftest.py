"""Both kinds of client behind one face, for a scripted server."""

import asyncio
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
from bilm_client._core.settings import Settings
from bilm_client._transport.grpc_async import GrpcAsyncTransport
from bilm_client._transport.grpc_sync import GrpcSyncTransport
from bilm_client.aio import AsyncTransportClient
from bilm_client.client import TransportClient

from tests.support.scripted import Scripted, answering, scripted

__all__ = ["answering", "scripted"]


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for all: grpc.aio still hands events to a loop for a moment after its last call has ended."""
    with asyncio.Runner() as one:
        yield one


class NoWait(GrpcSyncTransport):
    """Notes the waits before new attempts instead of waiting."""

    def __init__(self, delays_s: list[float], settings: Settings) -> None:
        super().__init__(settings)
        self.delays_s = delays_s

    def wait(self, timeout_s: float) -> None:
        self.delays_s.append(timeout_s)


class NoAsyncWait(GrpcAsyncTransport):
    """Notes the waits before new attempts instead of waiting."""

    def __init__(self, delays_s: list[float], settings: Settings) -> None:
        super().__init__(settings)
        self.delays_s = delays_s

    async def wait(self, timeout_s: float) -> None:
        self.delays_s.append(timeout_s)


class Either:
    """A client of either kind, called without awaits."""

    def __init__(self, target: str, runner: asyncio.Runner | None, **arguments: Any) -> None:
        self.delays_s: list[float] = []
        self.runner = runner
        settings = Settings(target=target, **arguments)
        self.client: Any
        if self.runner is None:
            self.client = TransportClient(settings, partial(NoWait, self.delays_s), uniform=no_jitter)
        else:
            self.client = AsyncTransportClient(settings, partial(NoAsyncWait, self.delays_s), uniform=no_jitter)

    def run(self, value: Any) -> Any:
        return value if self.runner is None else self.runner.run(_awaited(value))

    def embed(self, *arguments: Any, **options: Any) -> Any:
        return self.run(self.client.embed(*arguments, **options))

    def model_info(self, **options: Any) -> Any:
        return self.run(self.client.model_info(**options))

    def list_models(self, **options: Any) -> Any:
        return self.run(self.client.list_models(**options))

    def health(self, *arguments: Any, **options: Any) -> Any:
        return self.run(self.client.health(*arguments, **options))

    def embed_stream(self, sentences: Iterable[Any], **options: Any) -> Generator[Any, None, None]:
        results = self.client.embed_stream(sentences, **options)
        if self.runner is None:
            yield from results
            return
        try:
            while True:
                try:
                    yield self.run(anext(results))
                except StopAsyncIteration:
                    return
        finally:
            self.run(results.aclose())

    def close(self) -> None:
        self.run(self.client.close())


def no_jitter() -> float:
    """A factor of 1."""
    return 0.5


async def _awaited(value: Any) -> Any:
    return await value


Connect = Callable[..., Either]


@pytest.fixture(params=["sync", "async"])
def connect(
    request: pytest.FixtureRequest, scripted: Scripted, runner: asyncio.Runner
) -> Iterator[Callable[..., Either]]:
    """Makes clients of one kind for the scripted server, and closes them."""
    clients: list[Either] = []

    def make(**arguments: Any) -> Either:
        clients.append(Either(scripted.target, runner if request.param == "async" else None, **arguments))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def threads_before() -> set[threading.Thread]:
    return set(threading.enumerate())
