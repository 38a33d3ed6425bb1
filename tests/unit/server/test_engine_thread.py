"""Engines that take turns in one thread: none waits for ever, and each leaves by itself."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from bilm_api.constants import Priority, Reason
from bilm_model.engine.types import Capacity, EngineResult
from bilm_server.inference.engine_thread import EngineThread
from bilm_server.inference.types import Call, Outcomes, Sentence
from bilm_server.inference.worker import InferenceWorker, WorkerTiming

from tests.support.embedders import until
from tests.support.fake_engine import FakeEngine
from tests.support.sentences import new_sentence, reasons

PATIENT = WorkerTiming()
QUICK = WorkerTiming(probe_s=0.001, idle_check_s=0.001)


class OrderedEngine(FakeEngine[Sentence]):
    """Notes its number where all engines note theirs, for each round."""

    def __init__(self, number: int, order: list[int]) -> None:
        super().__init__(Capacity(2, 100))
        self._number, self._order = number, order

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[Sentence]]:
        self._order.append(self._number)
        return super().advance(leave_out=leave_out, max_steps=max_steps)


class Shared:
    """Two workers in one thread; `order` has a number for each round."""

    def __init__(self, timing: WorkerTiming) -> None:
        self.thread = EngineThread()
        self.order: list[int] = []
        self.engines: list[FakeEngine[Sentence]] = [OrderedEngine(number, self.order) for number in (0, 1)]
        self.workers = [InferenceWorker(engine, timing=timing, thread=self.thread) for engine in self.engines]

    def submit(
        self, number: int, *tokens: str, priority: Priority = Priority.INTERACTIVE
    ) -> "asyncio.Future[Outcomes]":
        return self.workers[number].submit([new_sentence(Call(priority=priority), *tokens)])


@asynccontextmanager
async def shared(timing: WorkerTiming = PATIENT) -> AsyncIterator[Shared]:
    it = Shared(timing)
    for worker in it.workers:
        await worker.start()
    try:
        yield it
    finally:
        for engine in it.engines:
            engine.go_on.set()
        for worker in it.workers:
            await worker.stop()
        await until(lambda: not it.thread.alive)


async def test_one_thread_computes_for_all() -> None:
    before = threading.active_count()
    async with shared() as it:
        assert threading.active_count() == before + 1
        futures = [it.submit(number, "a", "b") for number in (0, 1) for _ in range(5)]
        await asyncio.wait(futures, timeout=60)
        assert reasons(futures) == {None}


async def test_one_that_fails_leaves_the_other_alone_and_is_tried_again() -> None:
    async with shared(QUICK) as it:
        it.engines[0].broken = 10**9
        await until(lambda: not it.workers[0].healthy)
        futures = [it.submit(1, "a"), it.submit(0, "a")]
        await asyncio.wait(futures, timeout=60)
        assert reasons(futures[:1]) == {None}
        assert reasons(futures[1:]) == {Reason.MODEL_FAILING}
        assert it.workers[1].healthy

        def mended() -> bool:
            it.engines[0].broken = 0
            return it.workers[0].healthy

        await until(mended)
        again = it.submit(0, "a")
        await again
        assert reasons([again]) == {None}


async def test_one_that_is_busy_is_left_for_the_other_and_for_its_checks() -> None:
    """One has work without end; the other's sentence, and its check while it has none, come all the same."""
    async with shared(QUICK) as it:
        busy = [it.submit(0, *"abcdefgh" * 10) for _ in range(50)]
        await it.submit(1, "a")
        checks = it.engines[1].checks
        await until(lambda: it.engines[1].checks > checks)
        await asyncio.wait(busy, timeout=60)
        assert reasons(busy) == {None}


async def test_one_with_nothing_but_batch_work_leaves_seven_turns_in_eight_to_others() -> None:
    async with shared() as it:
        it.engines[0].go_on.clear()
        batch = it.submit(0, *["a"] * 80, priority=Priority.BATCH)
        await until(it.engines[0].computing.is_set)
        other = it.submit(1, *["b"] * 56)
        it.engines[0].go_on.set()
        await asyncio.wait([batch, other], timeout=60)
        assert reasons([batch, other]) == {None}
        assert it.order[1:65] == 8 * [*7 * [1], 0]


async def test_one_leaves_while_the_other_goes_on() -> None:
    async with shared() as it:
        await it.workers[0].stop()
        assert reasons([it.submit(0, "a")]) == {Reason.SHUTTING_DOWN}
        assert it.thread.alive
        future = it.submit(1, "a")
        await future
        assert reasons([future]) == {None}


async def test_one_that_cannot_begin_is_refused_and_leaves_the_other_alone() -> None:
    async with shared() as it:
        engine: FakeEngine[Sentence] = FakeEngine()
        engine.broken = 1
        third = InferenceWorker(engine, thread=it.thread)
        with pytest.raises(RuntimeError, match="broken"):
            await third.start()
        await third.stop()
        future = it.submit(1, "a")
        await future
        assert reasons([future]) == {None}


async def test_a_round_that_hangs_is_seen_whosever_it_is() -> None:
    async with shared() as it:
        it.engines[0].go_on.clear()
        future, other = it.submit(0, "a"), it.submit(1, "a")
        assert await asyncio.to_thread(it.engines[0].computing.wait, 60)
        heartbeats = it.thread.heartbeats
        assert it.thread.has_work
        it.thread.refuse_pending()
        assert Reason.MODEL_FAILING in reasons([future])
        it.engines[0].go_on.set()
        await until(lambda: it.thread.heartbeats > heartbeats and other.done())


async def test_an_error_of_its_own_ends_the_thread_for_all() -> None:
    thread = EngineThread()

    def bug(_: object) -> None:
        raise AssertionError("an error of our own")

    workers = [InferenceWorker(FakeEngine[Sentence](), bug, thread=thread) for _ in range(2)]
    for worker in workers:
        await worker.start()
    futures = [worker.submit([new_sentence(Call(), "a")]) for worker in workers]
    await asyncio.wait(futures, timeout=60)
    assert reasons(futures) <= {None, Reason.MODEL_FAILING}
    await until(lambda: not thread.alive)
    for worker in workers:
        assert reasons([worker.submit([new_sentence(Call(), "a")])]) == {Reason.MODEL_FAILING}
        await worker.stop()
        await until(lambda worker=worker: worker.idle)  # type: ignore[misc]


async def test_one_that_leaves_while_it_begins_is_waited_for() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    engine.go_on.clear()
    thread = EngineThread()
    worker = InferenceWorker(engine, thread=thread)
    starting = asyncio.create_task(worker.start())
    await until(lambda: thread.has_work)
    stopping = asyncio.create_task(worker.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    engine.go_on.set()
    await stopping
    await starting
    await until(lambda: not thread.alive)
    assert worker.idle
