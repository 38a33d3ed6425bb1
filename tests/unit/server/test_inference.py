import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from bilm_api.constants import Reason
from bilm_model.engine.types import Capacity
from bilm_model.scalar_mix import Selection
from bilm_server import inference
from bilm_server.errors import RefusalError
from bilm_server.inference import InferenceThread, Round
from bilm_server.jobs import Call, Computed, Job, Outcome
from bilm_server.requests import PreparedSentence, Wanted


def job(name: str = "a", call: Call | None = None) -> Job:
    sentence = PreparedSentence((name,), (), (), truncated=False, state=None, return_state=False)
    wanted = Wanted(Selection(), "float32", omit_tokens=False)
    return Job(sentence, wanted, state=None, want_state=False, call=call or Call(float("inf")))


class Model:
    """Each sentence ends in its third round; a round with a poisoned one fails, and so may anything else."""

    def __init__(self, poison: str = "poison") -> None:
        self.room = Capacity(64, 10_000)
        self.poison = poison
        self.broken = False
        self.ages: dict[Job, int] = {}
        self.groups: list[int] = []
        self.steps = 0
        self.checks = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def join(self, job: Job) -> None:
        self.ages[job] = 0

    def leave(self, job: Job) -> None:
        del self.ages[job]

    def advance(self) -> list[tuple[Job, Computed]]:
        self.go_on.wait()
        self.groups.append(len(self.ages))
        if self.broken or any(job.sentence.tokens == (self.poison,) for job in self.ages):
            raise RuntimeError("boom")
        self.ages = {job: age + 1 for job, age in self.ages.items()}
        self.steps += len(self.ages)
        ended = [job for job, age in self.ages.items() if age == 3]
        for job in ended:
            del self.ages[job]
        return [(job, Computed(np.array([ord(job.sentence.tokens[0][0])]), None)) for job in ended]

    def probe(self) -> None:
        self.ages.clear()
        if self.broken:
            raise RuntimeError("still broken")

    def check(self) -> None:
        assert not self.ages
        self.checks += 1
        if self.broken:
            raise RuntimeError("broken while idle")


@asynccontextmanager
async def running(
    model: Model,
    on_round: Callable[[Round], None] = lambda round: None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[InferenceThread]:
    thread = InferenceThread(model, on_round, clock)
    await thread.start()
    try:
        yield thread
    finally:
        model.go_on.set()
        await thread.stop()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it didn't come about"
        await asyncio.sleep(0.002)


async def settled(*futures: "asyncio.Future[Outcome]") -> list[Outcome | BaseException]:
    return await asyncio.gather(*futures, return_exceptions=True)


def reason(result: Outcome | BaseException) -> Reason:
    assert isinstance(result, RefusalError)
    return result.reason


async def test_the_thread_holds_no_result_while_it_waits() -> None:
    async with running(Model()) as thread:
        outcome = await thread.submit(job())
        held = weakref.ref(outcome)
        del outcome

        def let_go() -> bool:
            gc.collect()
            return held() is None

        await until(let_go)


@pytest.mark.parametrize("n_others", [0, 1, 2, 6, 63])
async def test_a_poisoned_sentence_costs_the_others_nothing(n_others: int) -> None:
    model = Model()
    model.go_on.clear()
    async with running(model) as thread:
        others = [thread.submit(job(chr(65 + number))) for number in range(n_others)]
        poisoned = thread.submit(job("poison"))
        model.go_on.set()
        results = await settled(*others, poisoned)
        assert reason(results[-1]) is Reason.INTERNAL
        for number, result in enumerate(results[:-1]):
            assert isinstance(result, Outcome)
            assert result.vectors.tolist() == [65 + number]  # computed anew from the beginning, not from the middle
        assert thread.healthy
        assert not thread.has_work
        fresh = await thread.submit(job("z"))  # room that the suspects had has come back
        assert fresh.vectors.tolist() == [ord("z")]
    assert len(model.groups) < 16 * (3 + 7)  # halves, not one by one


async def test_two_poisoned_sentences_are_both_found() -> None:
    model = Model()
    model.go_on.clear()
    async with running(model) as thread:
        names = ["a", "poison", "b", "c", "poison", "d"]
        futures = [thread.submit(job(name)) for name in names]
        model.go_on.set()
        results = await settled(*futures)
        failed = [name for name, result in zip(names, results, strict=True) if isinstance(result, RefusalError)]
        assert failed == ["poison", "poison"]


async def test_a_suspect_whose_caller_has_gone_is_not_computed_again() -> None:
    model = Model()
    model.go_on.clear()
    async with running(model) as thread:
        gone = Call(float("inf"))
        poisoned = thread.submit(job("poison", gone))
        other = thread.submit(job("a"))
        await until(lambda: thread.in_flight == 2)
        thread.abandon(gone)
        poisoned.cancel()
        model.go_on.set()
        assert (await other).vectors.tolist() == [ord("a")]
        await until(lambda: not thread.has_work)


async def test_when_the_model_fails_everybody_hears_of_it_and_later_it_may_recover(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "_PROBE_INTERVAL_S", 0.01)
    model = Model()
    model.go_on.clear()
    async with running(model) as thread:
        futures = [thread.submit(job()) for _ in range(3)]
        model.broken = True
        model.go_on.set()
        assert {reason(result) for result in await settled(*futures)} == {Reason.MODEL_FAILING}
        assert not thread.healthy
        (refused,) = await settled(thread.submit(job()))
        assert reason(refused) is Reason.MODEL_FAILING
        model.broken = False
        await until(lambda: thread.healthy)
        assert (await thread.submit(job())).vectors.tolist() == [ord("a")]


async def test_an_idle_model_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_IDLE_CHECK_INTERVAL_S", 0.01)
    model = Model()
    async with running(model) as thread:
        await until(lambda: model.checks > 2)
        assert thread.healthy
        model.broken = True
        await until(lambda: not thread.healthy)


async def test_a_model_that_hangs_while_it_is_idle_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_IDLE_CHECK_INTERVAL_S", 0.01)
    model = Model()
    monkeypatch.setattr(model, "check", model.go_on.wait)
    model.go_on.clear()
    async with running(model) as thread:
        await until(lambda: thread.has_work)
        beats = thread.beats
        assert thread.has_work
        assert thread.beats == beats  # what the watchdog takes for hanging
        model.go_on.set()
        await until(lambda: thread.beats > beats)


async def test_a_dead_thread_leaves_nobody_waiting() -> None:
    def bug(round: Round) -> None:
        raise AssertionError("an error of our own")

    async with running(Model(), bug) as thread:
        results = await settled(thread.submit(job()), thread.submit(job()))
        assert {reason(result) for result in results} == {Reason.MODEL_FAILING}
        await until(lambda: not thread.alive)
        (late,) = await settled(thread.submit(job()))
        assert reason(late) is Reason.MODEL_FAILING


async def test_who_waits_for_a_hung_round_can_be_let_go() -> None:
    model = Model()
    model.go_on.clear()
    async with running(model) as thread:
        future = thread.submit(job())
        await until(lambda: thread.in_flight == 1)
        beats = thread.beats
        thread.refuse_pending()
        (result,) = await settled(future)
        assert reason(result) is Reason.MODEL_FAILING
        assert thread.has_work
        assert thread.beats == beats
        model.go_on.set()
        await until(lambda: not thread.has_work)
        assert thread.beats > beats


async def test_what_is_not_done_at_the_end_is_refused() -> None:
    model = Model()
    model.room = Capacity(1, 10)
    model.go_on.clear()
    thread = InferenceThread(model)
    await thread.start()
    futures = [thread.submit(job()) for _ in range(3)]
    await until(lambda: thread.in_flight == 1)
    assert thread.waiting == 2
    stopping = asyncio.create_task(thread.stop())
    await asyncio.sleep(0)
    model.go_on.set()
    await stopping
    assert {reason(result) for result in await settled(*futures)} == {Reason.SHUTTING_DOWN}


async def test_every_round_is_told() -> None:
    rounds: list[Round] = []
    async with running(Model(), rounds.append) as thread:
        await thread.submit(job())
        await settled(thread.submit(job("poison")))
    assert [(done.rows, done.steps, done.failed) for done in rounds] == [(1, 1, False)] * 3 + [(1, 0, True)]


async def test_the_speed_is_that_of_the_steps_and_not_of_sentences_that_ended() -> None:
    """Long sentences: none ends for a thousand rounds, each of which advances two of them by 25 steps in 0.5 s."""
    now_s = [0.0]

    class Slow(Model):
        def advance(self) -> list[tuple[Job, Computed]]:
            now_s[0] += 0.5
            self.steps += 25 * len(self.ages)
            self.groups.append(len(self.ages))
            if len(self.groups) < 1000:
                return []
            ended = [(job, Computed(np.zeros(1), None)) for job in self.ages]
            self.ages.clear()
            return ended

    speeds: list[float] = []
    model = Slow()
    async with running(model, lambda _: speeds.append(thread.steps_per_s), lambda: now_s[0]) as thread:
        await settled(thread.submit(job()), thread.submit(job()))
    rows = model.groups[-1]
    assert speeds[900] == pytest.approx(50 * rows, rel=0.05)
    assert min(speeds) > 0
