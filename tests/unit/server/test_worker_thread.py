"""The worker's own thread: what it does while nothing drives it, while it hangs, and when it ends."""

import asyncio
import gc
import logging
import random
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from bilm_api.constants import Reason
from bilm_model.engine.types import Capacity
from bilm_server.inference.types import NO_DEADLINE_S, Call, Outcomes, RoundReport, Sentence
from bilm_server.inference.worker import InferenceWorker, WorkerTiming

from tests.support.fake_engine import FakeEngine
from tests.support.sentences import new_sentence, reasons

QUICK = WorkerTiming(probe_s=0.001, idle_check_s=0.001)


@pytest.fixture(autouse=True)
def _no_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # a record with a traceback keeps the sentence alive


@asynccontextmanager
async def running(
    engine: FakeEngine[Sentence],
    on_round: Callable[[RoundReport], None] = lambda report: None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[InferenceWorker]:
    worker = InferenceWorker(engine, on_round, clock, QUICK)
    await worker.start()
    try:
        yield worker
    finally:
        engine.go_on.set()
        await worker.stop()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it didn't come about"
        await asyncio.sleep(0.001)


async def in_a_round(engine: FakeEngine[Sentence]) -> None:
    assert await asyncio.to_thread(engine.computing.wait, 60)


def submit(worker: InferenceWorker, *tokens: str, times: int = 1) -> list["asyncio.Future[Outcomes]"]:
    return [worker.submit([new_sentence(Call(), *tokens)]) for _ in range(times)]


async def settled(futures: list["asyncio.Future[Outcomes]"]) -> set[Reason | None]:
    await asyncio.wait(futures, timeout=60)
    return reasons(futures)


async def test_the_thread_holds_no_result_while_it_waits() -> None:
    async with running(FakeEngine()) as worker:
        (result,) = await worker.submit([new_sentence(Call(), "a")])
        kept = weakref.ref(result)
        del result
        await until(lambda: bool(gc.collect() or True) and kept() is None)


async def test_an_idle_engine_is_checked_and_tried_again_when_it_fails() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    async with running(engine) as worker:
        await until(lambda: engine.checks > 2)
        assert worker.healthy
        engine.broken = 10**9  # a failure that ends by itself may be over before it is seen
        await until(lambda: not worker.healthy)

        def mended() -> bool:
            engine.broken = 0  # each time: a warm-up that counts down may undo one
            return worker.healthy

        await until(mended)


async def test_an_engine_that_hangs_in_a_self_check_is_seen() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    async with running(engine) as worker:
        engine.go_on.clear()
        await until(lambda: worker.has_work)
        heartbeats = worker.thread.heartbeats
        assert worker.has_work
        assert worker.thread.heartbeats == heartbeats  # what the watchdog takes for hanging
        engine.go_on.set()
        await until(lambda: worker.thread.heartbeats > heartbeats)


async def test_sentences_of_a_hung_round_can_be_refused() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    async with running(engine) as worker:
        engine.go_on.clear()
        futures = submit(worker, "a")
        await in_a_round(engine)
        heartbeats = worker.thread.heartbeats
        worker.refuse_pending()
        assert reasons(futures) == {Reason.MODEL_FAILING}
        assert worker.has_work
        assert worker.thread.heartbeats == heartbeats
        engine.go_on.set()
        await until(lambda: worker.idle and worker.thread.heartbeats > heartbeats)


async def test_a_thread_that_dies_leaves_nothing_waiting() -> None:
    def bug(report: RoundReport) -> None:
        raise AssertionError("an error of our own")

    async with running(FakeEngine(Capacity(2, 100)), bug) as worker:
        futures = [*submit(worker, "a"), *submit(worker, "b", "c"), *submit(worker, "d")]
        assert await settled(futures) <= {None, Reason.MODEL_FAILING}
        await until(lambda: not worker.thread.alive)
        assert await settled(submit(worker, "a")) == {Reason.MODEL_FAILING}
        assert worker.idle


async def test_what_is_not_done_at_the_end_is_refused() -> None:
    engine: FakeEngine[Sentence] = FakeEngine(Capacity(1, 10))
    async with running(engine) as worker:
        engine.go_on.clear()
        futures = submit(worker, "a", "b", times=3)
        await in_a_round(engine)
        assert worker.waiting == 2
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0)
        engine.go_on.set()
        await stopping
        assert await settled(futures) == {Reason.SHUTTING_DOWN}
        assert worker.idle


async def test_a_stop_while_the_engine_hangs_leaves_nothing_waiting() -> None:
    engine: FakeEngine[Sentence] = FakeEngine(Capacity(1, 100))
    worker = InferenceWorker(engine, timing=WorkerTiming(stop_s=0.01))
    await worker.start()
    engine.go_on.clear()
    futures = submit(worker, "a", times=3)
    await in_a_round(engine)
    await worker.stop()
    assert reasons(futures) == {Reason.SHUTTING_DOWN}
    engine.go_on.set()
    await until(lambda: not worker.thread.alive)
    assert worker.idle


async def test_what_comes_during_a_warm_up_that_fails_is_refused() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    engine.broken = 1
    worker = InferenceWorker(engine)
    futures = submit(worker, "a", times=3)
    with pytest.raises(RuntimeError, match="broken"):
        await worker.start()
    assert await settled(futures) == {Reason.MODEL_FAILING}
    assert worker.idle
    await worker.stop()


async def test_what_comes_to_a_thread_that_is_never_started_ends_with_its_stop() -> None:
    worker = InferenceWorker(FakeEngine[Sentence]())
    futures = submit(worker, "a")
    await worker.stop()
    assert await settled(futures) == {Reason.SHUTTING_DOWN}
    assert worker.idle


@pytest.mark.parametrize("seed", range(2))
async def test_mixed_rounds_leave_nothing(caplog: pytest.LogCaptureFixture, seed: int) -> None:
    """Cancelled, late, unfit and failing sentences at once, at whatever moment the thread is."""
    chance, now_s = random.Random(seed), [0.0]
    engine: FakeEngine[Sentence] = FakeEngine(Capacity(6, 80))
    words = ("a", "b", "a", "b", "a", "b", "c", "c", "d", "e", "unfit", "poison", "stuck")
    futures: list[asyncio.Future[Outcomes]] = []
    async with running(engine, clock=lambda: now_s[0]) as worker:

        def ask() -> None:
            call = Call(now_s[0] + chance.choice((-1.0, 2.0, NO_DEADLINE_S, NO_DEADLINE_S)))
            sentences = [
                new_sentence(call, *chance.choices(words, k=chance.choice((0, 1, 2, 3, 5, 40))))
                for _ in range(chance.randint(1, 6))
            ]
            n_together = chance.choice((1, len(sentences)))
            futures.extend(
                worker.submit(sentences[first : first + n_together]) for first in range(0, len(sentences), n_together)
            )

        def cancel() -> None:
            for future in chance.choices(futures, k=3) if futures else ():
                future.cancel()

        def fail() -> None:
            engine.broken = chance.randint(1, 3)

        actions: list[Callable[[], None]] = [ask, cancel, fail, worker.refuse_pending]
        for _ in range(500):
            (action,) = chance.choices(actions, weights=(60, 30, 1, 1))
            action()
            now_s[0] += chance.random()
            await asyncio.sleep(0 if chance.random() < 0.8 else 0.001)
        await asyncio.wait(futures, timeout=60)
        await until(lambda: worker.idle)
    assert [record.message for record in caplog.records if record.levelno >= logging.CRITICAL] == []


async def test_a_shutdown_in_the_middle_of_everything_leaves_nothing() -> None:
    engine: FakeEngine[Sentence] = FakeEngine(Capacity(3, 80))
    async with running(engine) as worker:
        engine.go_on.clear()
        futures = []
        for tokens in (("a", "b"), ("poison",), ("c",), ("stuck", "x"), ("d",)):
            futures += submit(worker, *tokens, times=4)
        await in_a_round(engine)
        for future in futures[-4:]:
            future.cancel()
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0)
        engine.go_on.set()
        await stopping
        await asyncio.wait(futures, timeout=60)
        assert worker.idle
