"""The server's life, with parts that only keep what was asked of them."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from bilm_server.errors import BindError, ConfigurationError, EngineLostError
from bilm_server.lifecycle import DrainTimes, Server

GRACE_S = 7.0


class Parts:
    """Fakes of all parts, and what was asked of them in its order.

    Attributes:
        done: names of what was called.
        fail: name of what raises, and the error.
        lost: of the acceptor.
        watching: what the watchdog does until it is cancelled.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fail: tuple[str, Exception] | None = None
        self.lost = asyncio.Event()
        self.engine_lost = asyncio.Event()

    def do(self, name: str) -> None:
        self.done.append(name)
        if self.fail is not None and self.fail[0] == name:
            raise self.fail[1]

    def sync(self, name: str) -> Callable[[], None]:
        return lambda: self.do(name)

    def listener(self, name: str) -> Any:
        async def start() -> str:
            self.do(f"start {name}")
            return f"{name} on its address"

        async def stop(grace_s: float = 0) -> None:
            self.do(f"stop {name}, {grace_s:g} s")

        return SimpleNamespace(start=start, stop=stop, lost=self.lost, target="127.0.0.1:1")

    def worker(self) -> Any:
        async def start() -> None:
            self.do("start worker")

        async def stop() -> None:
            self.do("stop worker")

        return SimpleNamespace(start=start, stop=stop)

    def watchdog(self) -> Any:
        async def run() -> None:
            await self.engine_lost.wait()
            raise EngineLostError("the model hangs")

        return SimpleNamespace(look=self.sync("look"), run=run)

    def server(self) -> Server:
        return Server(
            SimpleNamespace(worker=self.worker()),  # type: ignore[arg-type]
            SimpleNamespace(drain=self.sync("NOT_SERVING")),  # type: ignore[arg-type]
            self.watchdog(),
            self.listener("calls"),
            [self.listener("health")],
            open_calls=SimpleNamespace(end=self.sync("end open calls")),  # type: ignore[arg-type]
            drain_times=DrainTimes(0.0, GRACE_S),
            prepare=[self.sync("read tokens")],
            close=[self.sync("stop conversions")],
        )


@pytest.fixture
def parts() -> Parts:
    return Parts()


STARTED = ["read tokens", "start calls", "start health", "start worker", "look"]
STOPPED = ["stop calls, 0 s", "stop health, 0 s", "stop worker", "stop conversions"]


async def test_a_life(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = parts.server()
    await server.start()
    assert parts.done == STARTED
    serving = asyncio.create_task(server.serve())
    server.ask_to_stop()
    await serving
    await server.drain()
    await server.stop()
    assert parts.done == [*STARTED, "NOT_SERVING", "end open calls", f"stop calls, {GRACE_S:g} s", *STOPPED]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["calls on its address", "health on its address"]
    assert lines[-1] == "stopped"


@pytest.mark.parametrize(
    ("name", "error"),
    [("read tokens", ConfigurationError("bad")), ("start health", BindError("taken")), ("start worker", ValueError())],
)
async def test_a_start_that_fails_goes_no_further_and_can_be_stopped(parts: Parts, name: str, error: Exception) -> None:
    parts.fail = (name, error)
    server = parts.server()
    with pytest.raises(type(error)):
        await server.start()
    assert parts.done == STARTED[: STARTED.index(name) + 1]
    await server.stop()
    assert parts.done[-len(STOPPED) :] == STOPPED


async def test_it_can_be_stopped_without_a_start_and_twice(parts: Parts) -> None:
    server = parts.server()
    await server.stop()
    await server.stop()
    assert parts.done == [*STOPPED, *STOPPED]


async def test_serving_ends_when_nothing_listens_any_more(parts: Parts) -> None:
    server = parts.server()
    await server.start()
    parts.lost.set()
    with pytest.raises(BindError, match=r"can't listen on 127\.0\.0\.1:1 any more"):
        await server.serve()
    await server.stop()


async def test_serving_ends_with_the_engine(parts: Parts) -> None:
    server = parts.server()
    await server.start()
    parts.engine_lost.set()
    with pytest.raises(EngineLostError, match="the model hangs"):
        await server.serve()
    await server.stop()
