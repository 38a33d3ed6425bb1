"""The server's life, with parts that only keep what was asked of them."""

import asyncio
import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from bilm_model.errors import ConfigError
from bilm_server.errors import BindError, ConfigurationError, EngineLostError
from bilm_server.lifecycle import DrainTimes, LoadedParts, Server

GRACE_S = 7.0


class Parts:
    """Fakes of all parts, and what was asked of them in its order.

    Attributes:
        done: names of what was called.
        fail: name of what raises, and the error.
        lost: of the acceptor.
        may_load: is waited for by the thread that loads.
        later: set when what can wait is loaded.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fail: tuple[str, Exception] | None = None
        self.lost = asyncio.Event()
        self.engine_lost = asyncio.Event()
        self.may_load, self.later = threading.Event(), threading.Event()
        self.may_load.set()
        self.load_later: Callable[[], object] = self.later.set

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

    async def start_models(self) -> None:
        self.do("start models")

    def models(self) -> Any:
        async def stop() -> None:
            self.do("stop models")

        return SimpleNamespace(stop=stop, loading=False)

    def watchdog(self) -> Any:
        async def run() -> None:
            await self.engine_lost.wait()
            raise EngineLostError("the model hangs")

        return SimpleNamespace(look=self.sync("look"), run=run)

    def load(self) -> LoadedParts:
        self.do("load")
        self.may_load.wait(60)
        return LoadedParts(self.models(), self.start_models, self.watchdog(), self.sync("open"), self.load_later)

    def server(self) -> Server:
        return Server(
            SimpleNamespace(drain=self.sync("NOT_SERVING")),  # type: ignore[arg-type]
            self.listener("calls"),
            [self.listener("health")],
            self.load,
            open_calls=SimpleNamespace(end=self.sync("end open calls")),  # type: ignore[arg-type]
            drain_times=DrainTimes(0.0, GRACE_S),
            prepare=[self.sync("read tokens")],
            close=[self.sync("stop conversions")],
        )


@pytest.fixture
def parts() -> Parts:
    return Parts()


LISTENING = ["read tokens", "start calls", "start health"]
STARTED = [*LISTENING, "load", "start models", "open", "look"]
STOPPED_LISTENING = ["stop calls, 0 s", "stop health, 0 s"]
STOPPED = [*STOPPED_LISTENING, "stop models", "stop conversions"]
STOPPED_UNLOADED = [*STOPPED_LISTENING, "stop conversions"]


async def started(server: Server) -> None:
    await server.start()
    await server.load()


async def test_a_life(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = parts.server()
    await server.start()
    assert parts.done == LISTENING
    await server.load()
    assert parts.done == STARTED
    assert await asyncio.to_thread(parts.later.wait, 60)
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
    [
        ("read tokens", ConfigurationError("bad")),
        ("start health", BindError("taken")),
        ("load", ConfigError("no such device")),
        ("start models", ValueError()),
    ],
)
async def test_a_start_that_fails_goes_no_further_and_can_be_stopped(parts: Parts, name: str, error: Exception) -> None:
    parts.fail = (name, error)
    server = parts.server()
    with pytest.raises(type(error)):
        await started(server)
    assert parts.done == STARTED[: STARTED.index(name) + 1]
    await server.stop()
    stopped = STOPPED if name == "start models" else STOPPED_UNLOADED
    assert parts.done[-len(stopped) :] == stopped


async def test_a_server_that_is_stopped_while_it_loads_ends_without_waiting_for_that(parts: Parts) -> None:
    parts.may_load.clear()
    server = parts.server()
    try:
        await server.start()
        loading = asyncio.create_task(server.load())
        await asyncio.sleep(0)
        server.ask_to_stop()
        await loading
        await server.serve()
        await server.drain()
        await server.stop()
        assert server.loading
        drained = ["NOT_SERVING", "end open calls", f"stop calls, {GRACE_S:g} s"]
        assert parts.done == [*LISTENING, "load", *drained, *STOPPED_UNLOADED]
    finally:
        parts.may_load.set()


async def test_loading_ends_when_nothing_listens_any_more(parts: Parts) -> None:
    parts.may_load.clear()
    server = parts.server()
    try:
        await server.start()
        parts.lost.set()
        await server.load()
        with pytest.raises(BindError, match="any more"):
            await server.serve()
    finally:
        parts.may_load.set()
        await server.stop()


async def test_what_cannot_be_loaded_later_is_an_error_in_the_log(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    logged = asyncio.Event()

    def fail() -> None:
        raise ImportError("no such library")

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    parts.load_later = fail
    server = parts.server()
    logger, heard = logging.getLogger("bilm_server.lifecycle"), Heard()
    logger.addHandler(heard)
    try:
        await started(server)
        await logged.wait()
    finally:
        logger.removeHandler(heard)
        await server.stop()
    assert [record.getMessage() for record in caplog.records] == ["what texts need can't be loaded"]


async def test_it_can_be_stopped_without_a_start_and_twice(parts: Parts) -> None:
    server = parts.server()
    await server.stop()
    await server.stop()
    assert parts.done == [*STOPPED_UNLOADED, *STOPPED_UNLOADED]


async def test_serving_ends_when_nothing_listens_any_more(parts: Parts) -> None:
    server = parts.server()
    await started(server)
    parts.lost.set()
    with pytest.raises(BindError, match=r"can't listen on 127\.0\.0\.1:1 any more"):
        await server.serve()
    await server.stop()


async def test_serving_ends_with_the_engine(parts: Parts) -> None:
    server = parts.server()
    await started(server)
    parts.engine_lost.set()
    with pytest.raises(EngineLostError, match="the model hangs"):
        await server.serve()
    await server.stop()
