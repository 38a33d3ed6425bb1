"""Every sentence ends exactly once, in a result, a refusal or a cancellation, and leaves nothing behind."""

import asyncio
import gc
import logging
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from bilm_api.constants import Reason
from bilm_model.engine.types import Capacity
from bilm_model.scalar_mix import Selection
from bilm_server import inference
from bilm_server.errors import RefusalError
from bilm_server.inference import InferenceThread
from bilm_server.jobs import Call, Computed, Job, Outcome
from bilm_server.requests import PreparedSentence, Wanted

WANTED = Wanted(Selection(), "float32", omit_tokens=False)
NEVER = float("inf")


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """What was there before can't be garbage of these tests, and looking through torch takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # a record with a traceback keeps the sentence alive


def job(call: Call, *tokens: str) -> Job:
    sentence = PreparedSentence(tokens, (), (), truncated=False, state=None, return_state=False)
    return Job(sentence, WANTED, state=None, want_state=False, call=call)


class Engine:
    """Keeps a real engine's books: what joins has to fit, and only what has joined can leave.

    Each sentence ends after as many rounds as it has tokens. "poison" fails each round, "unfit" can't join, "stuck"
    can't leave. While `broken` isn't 0, each probe fails and counts it down.
    """

    def __init__(self, room: Capacity) -> None:
        self.room = room
        self.steps = 0
        self.remaining: dict[Job, int] = {}
        self.broken = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.computing = threading.Event()

    @property
    def used(self) -> Capacity:
        return Capacity(len(self.remaining), sum(job.sentence.n_steps for job in self.remaining))

    def join(self, job: Job) -> None:
        if "unfit" in job.sentence.tokens:
            raise MemoryError
        assert job not in self.remaining
        self.remaining[job] = len(job.sentence.tokens)
        assert self.room.fits(self.used)

    def leave(self, job: Job) -> None:
        if "stuck" in job.sentence.tokens:
            raise RuntimeError("it can't leave")
        del self.remaining[job]

    def advance(self) -> list[tuple[Job, Computed]]:
        self.computing.set()
        self.go_on.wait()
        if self.broken or any("poison" in job.sentence.tokens for job in self.remaining):
            raise RuntimeError("boom")
        ended = [job for job, left in self.remaining.items() if left <= 1]
        self.remaining = {job: left - 1 for job, left in self.remaining.items() if left > 1}
        self.steps += len(self.remaining) + len(ended)
        return [(job, Computed(np.zeros(1), None)) for job in ended]

    def probe(self) -> None:
        self.remaining.clear()
        if self.broken:
            self.broken -= 1
            raise RuntimeError("broken")

    def check(self) -> None:
        assert not self.remaining


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it didn't come about"
        await asyncio.sleep(0.001)


class Running:
    """A thread on an engine, and everything that was ever asked of it."""

    def __init__(self, engine: Engine, now_s: Callable[[], float] = lambda: 0.0) -> None:
        self.engine = engine
        self.thread = InferenceThread(engine, clock=now_s)
        self.futures: list[asyncio.Future[Outcome]] = []
        self.ends: list[int] = []
        self.jobs: weakref.WeakSet[Job] = weakref.WeakSet()

    def submit(self, call: Call, *tokens: str) -> asyncio.Future[Outcome]:
        new = job(call, *tokens)
        self.jobs.add(new)
        future = self.thread.submit(new)
        number = len(self.futures)
        self.futures.append(future)
        self.ends.append(0)

        def ended(_: object) -> None:
            self.ends[number] += 1

        future.add_done_callback(ended)
        return future

    async def settle(self) -> None:
        await asyncio.wait_for(asyncio.gather(*self.futures, return_exceptions=True), 30)
        await until(lambda: not (self.thread.waiting or self.thread.in_flight or self.thread.has_work))

    async def check_nothing_is_left(self) -> None:
        assert (self.thread.waiting, self.thread.in_flight) == (0, 0)
        assert self.thread._scheduler.used == Capacity(0, 0)
        assert not self.thread._pending
        assert self.ends == [1] * len(self.futures)
        for future in self.futures:
            assert future.cancelled() or future.exception() is None or isinstance(future.exception(), RefusalError)
        self.futures.clear()
        self.ends.clear()
        await until(lambda: bool(gc.collect() or True) and not self.jobs)  # the thread may be on its way out of a round


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, now_s: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[Running]:
    """A started thread; what nobody retrieves or sets twice, and what it dies of, is an error."""
    monkeypatch.setattr(inference, "_PROBE_INTERVAL_S", 0.001)
    wrong: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    found = Running(engine, now_s)
    await found.thread.start()
    try:
        yield found
    finally:
        engine.go_on.set()
        await found.thread.stop()
        del found
        gc.collect()
    assert wrong == []


def reasons(futures: list["asyncio.Future[Outcome]"]) -> set[Reason | None]:
    errors = [future.exception() for future in futures]
    return {error.reason if isinstance(error, RefusalError) else None for error in errors}


async def test_sixty_late_calls_of_six_sentences_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Capacity(4, 100))
    async with running(monkeypatch, engine, lambda: 100.0) as found:
        for _ in range(60):
            call = Call(deadline_s=99.0)
            futures = [found.submit(call, "a", "b") for _ in range(6)]
            await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
            found.thread.abandon(call)  # as Embed does, at the first refusal
        await found.settle()
        await found.check_nothing_is_left()


async def test_when_one_sentence_of_a_call_is_late_its_siblings_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fits and is computed, another is late: nobody waits for the rest once the call has been refused."""
    now_s = [0.0]
    engine = Engine(Capacity(1, 100))
    engine.go_on.clear()
    async with running(monkeypatch, engine, lambda: now_s[0]) as found:
        call = Call(deadline_s=1.0)
        futures = [found.submit(call, "a", "b") for _ in range(6)]
        await asyncio.to_thread(engine.computing.wait, 10)
        now_s[0] = 2.0
        engine.go_on.set()
        await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        found.thread.abandon(call)
        await found.settle()
        assert {future.cancelled() or reasons([future]).pop() for future in futures} <= {
            True,
            None,
            Reason.DEADLINE_EXCEEDED,
        }
        await found.check_nothing_is_left()


async def test_abandoning_ends_the_futures_of_what_waits_and_of_what_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(Capacity(1, 100))
    engine.go_on.clear()
    async with running(monkeypatch, engine) as found:
        call = Call(NEVER)
        futures = [found.submit(call, "a", "b", "c") for _ in range(5)]
        await asyncio.to_thread(engine.computing.wait, 10)
        stays = found.submit(Call(NEVER), "d")
        found.thread.abandon(call)
        assert all(future.cancelled() for future in futures)
        assert found.thread.waiting == 1
        engine.go_on.set()
        assert isinstance(await stays, Outcome)
        await found.settle()
        await found.check_nothing_is_left()


async def test_a_cancelled_future_takes_its_sentence_out_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Capacity(1, 100))
    engine.go_on.clear()
    async with running(monkeypatch, engine) as found:
        call = Call(NEVER)
        computed, waits, stays = (found.submit(call, "a", "b", "c") for _ in range(3))
        await asyncio.to_thread(engine.computing.wait, 10)
        computed.cancel()
        waits.cancel()
        await asyncio.sleep(0)
        assert found.thread.waiting == 1
        engine.go_on.set()
        assert isinstance(await stays, Outcome)
        await found.settle()
        assert engine.steps == 3 + 1  # one round of the cancelled one was under way
        await found.check_nothing_is_left()


async def test_who_is_let_go_from_a_hung_round_leaves_nothing_when_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Capacity(2, 100))
    engine.go_on.clear()
    async with running(monkeypatch, engine) as found:
        futures = [found.submit(Call(NEVER), "a", "b") for _ in range(6)]
        await asyncio.to_thread(engine.computing.wait, 10)
        found.thread.refuse_pending()
        assert reasons(futures) == {Reason.MODEL_FAILING}
        assert (found.thread.waiting, found.thread.in_flight) == (0, 2)
        engine.go_on.set()
        await found.settle()
        await found.check_nothing_is_left()


@pytest.mark.parametrize("others", [0, 3])
async def test_a_sentence_that_cannot_join_is_refused_alone(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    async with running(monkeypatch, Engine(Capacity(8, 100))) as found:
        good = [found.submit(Call(NEVER), "a", "b") for _ in range(others)]
        unfit = found.submit(Call(NEVER), "unfit")
        await found.settle()
        assert reasons([unfit]) == {Reason.INTERNAL}
        assert reasons(good) <= {None}
        await found.check_nothing_is_left()


async def test_when_no_sentence_can_join_the_model_is_probed_and_everybody_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(Capacity(8, 100))
    async with running(monkeypatch, engine) as found:
        engine.broken = 1
        futures = [found.submit(Call(NEVER), "unfit") for _ in range(3)]
        await found.settle()
        assert Reason.MODEL_FAILING in reasons(futures)
        await found.check_nothing_is_left()


async def test_a_sentence_that_cannot_leave_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Capacity(8, 100))
    engine.go_on.clear()
    async with running(monkeypatch, engine) as found:
        stuck = found.submit(Call(NEVER), "stuck", "b", "c")
        good = [found.submit(Call(NEVER), "a", "b", "c") for _ in range(3)]
        await asyncio.to_thread(engine.computing.wait, 10)
        stuck.cancel()
        engine.go_on.set()
        await found.settle()
        assert reasons(good) == {None}
        await found.check_nothing_is_left()


async def test_a_culprit_whose_caller_has_gone_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Capacity(8, 100))
    engine.go_on.clear()
    async with running(monkeypatch, engine) as found:
        poison, good = found.submit(Call(NEVER), "poison"), found.submit(Call(NEVER), "a")
        await asyncio.to_thread(engine.computing.wait, 10)
        poison.cancel()
        engine.go_on.set()
        await found.settle()
        assert reasons([good]) == {None}
        await found.check_nothing_is_left()


async def test_what_comes_during_a_warm_up_that_fails_is_refused() -> None:
    engine = Engine(Capacity(1, 100))
    engine.broken = 1
    thread = InferenceThread(engine)
    futures = [thread.submit(job(Call(NEVER), "a")) for _ in range(3)]
    with pytest.raises(RuntimeError, match="broken"):
        await thread.start()
    await asyncio.wait(futures, timeout=10)
    assert reasons(futures) == {Reason.MODEL_FAILING}
    assert thread.waiting == 0
    await thread.stop()


async def test_what_comes_to_a_thread_that_is_never_started_ends_with_its_stop() -> None:
    thread = InferenceThread(Engine(Capacity(1, 100)))
    future = thread.submit(job(Call(NEVER), "a"))
    await thread.stop()
    assert reasons([future]) == {Reason.SHUTTING_DOWN}
    assert thread.waiting == 0


async def test_a_stop_while_the_engine_hangs_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_STOP_TIMEOUT_S", 0.01)
    engine = Engine(Capacity(1, 100))
    engine.go_on.clear()
    thread = InferenceThread(engine)
    await thread.start()
    futures = [thread.submit(job(Call(NEVER), "a")) for _ in range(3)]
    await asyncio.to_thread(engine.computing.wait, 10)
    await thread.stop()
    assert reasons(futures) == {Reason.SHUTTING_DOWN}
    engine.go_on.set()
    await asyncio.to_thread(thread._thread.join, 10)
    assert (thread.waiting, thread.in_flight) == (0, 0)


async def test_an_error_of_the_threads_own_loses_no_result_that_was_computed() -> None:
    def bug(done: inference.Round) -> None:
        raise AssertionError("an error of our own")

    thread = InferenceThread(Engine(Capacity(2, 100)), bug)
    await thread.start()
    futures = [thread.submit(job(Call(NEVER), *tokens)) for tokens in (("a",), ("b", "c"), ("d",))]
    await asyncio.wait(futures, timeout=10)
    assert all(future.done() for future in futures)
    await thread.stop()
    assert (thread.waiting, thread.in_flight) == (0, 0)


@pytest.mark.parametrize("seed", range(4))
async def test_a_thousand_mixed_rounds_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    chance, now_s = random.Random(seed), [0.0]
    engine = Engine(Capacity(6, 80))
    words = ("a", "b", "a", "b", "a", "b", "c", "c", "d", "e", "unfit", "poison", "stuck")
    async with running(monkeypatch, engine, lambda: now_s[0]) as found:
        calls: list[Call] = []

        def ask() -> None:
            call = Call(now_s[0] + chance.choice((-1.0, 2.0, NEVER, NEVER)))
            calls.append(call)
            for _ in range(chance.randint(1, 6)):
                found.submit(call, *chance.choices(words, k=chance.choice((0, 1, 2, 3, 5, 40))))

        def give_up() -> None:
            if calls:
                found.thread.abandon(calls.pop(chance.randrange(len(calls))))

        def cancel() -> None:
            if found.futures:
                chance.choice(found.futures).cancel()

        def fail() -> None:
            engine.broken = chance.randint(1, 3)

        actions: list[Callable[[], None]] = [ask, give_up, cancel, fail, found.thread.refuse_pending]
        for _ in range(1000):
            (action,) = chance.choices(actions, weights=(60, 20, 10, 1, 1))
            action()
            now_s[0] += chance.random()
            await asyncio.sleep(0 if chance.random() < 0.8 else 0.001)
        await found.settle()
        await found.check_nothing_is_left()
    assert [record.message for record in caplog.records if record.levelno >= logging.CRITICAL] == []


async def test_a_shutdown_in_the_middle_of_everything_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Capacity(3, 80))
    engine.go_on.clear()
    async with running(monkeypatch, engine) as found:
        for tokens in (("a", "b"), ("poison",), ("c",), ("stuck", "x"), ("d",)):
            call = Call(NEVER)
            for _ in range(4):
                found.submit(call, *tokens)
        await asyncio.to_thread(engine.computing.wait, 10)
        found.thread.abandon(call)
        stopping = asyncio.create_task(found.thread.stop())
        await asyncio.sleep(0)
        engine.go_on.set()
        await stopping
        await found.settle()
        await found.check_nothing_is_left()
