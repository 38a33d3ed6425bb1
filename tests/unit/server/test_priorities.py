"""Two priorities below admission: batch steps aside, holds a part of the capacity, and never starves."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from bilm_api.constants import Priority, Reason
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.state import LstmStateCodec
from bilm_model.engine.types import Capacity, EngineResult
from bilm_server.inference.batch import BATCH_ROUND_S
from bilm_server.inference.scheduler import LONG_STEPS, Scheduler
from bilm_server.inference.types import Call, RoundReport, Sentence
from bilm_server.inference.worker import InferenceWorker
from bilm_server.limits import for_long_sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.fake_engine import FakeEngine
from tests.support.sentences import DrivenWorker, delivered, new_sentence, reasons, result

NEVER = float("inf")
INTERACTIVE, BATCH = Priority
Chance = st.randoms(use_true_random=False)


def need(n_steps: int) -> Capacity:
    return Capacity(1 if n_steps else 0, n_steps)


@dataclass
class Simulation:
    """Sentences that join and end; what joins is checked against the bounds."""

    capacity: Capacity
    ahead: int
    chance: random.Random
    share: float = 0.125
    lengths: list[int] = field(default_factory=list)
    priorities: list[Priority] = field(default_factory=list)
    callers: list[int] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler: Scheduler[int] = Scheduler(self.capacity, self.ahead, self.share)

    def add(self, priority: Priority, caller: int, n_steps: int) -> int:
        item = len(self.lengths)
        self.lengths.append(n_steps)
        self.priorities.append(priority)
        self.callers.append(caller)
        assert self.scheduler.ever_fits(need(n_steps), priority)
        self.scheduler.add(item, (priority, caller), need(n_steps), NEVER, priority)
        return item

    def add_any(self, priority: Priority) -> int:
        n_steps = self.chance.choice((0, 5, 20, 20, 40, LONG_STEPS + 1, for_long_sentences(self.capacity.steps)))
        return self.add(priority, self.chance.randrange(4), n_steps)

    def decide(self) -> Sequence[int]:
        found = self.scheduler.decide(0.0).items
        self.joined += found
        self.in_flight += found
        self.check()
        return found

    def end_one(self) -> None:
        """Let one end, the one that joined first in half of the cases: so each does at some time."""
        position = 0 if self.chance.random() < 0.5 else self.chance.randrange(len(self.in_flight))
        item = self.in_flight.pop(position)
        self.scheduler.release(need(self.lengths[item]), self.priorities[item])

    def used(self, *priorities: Priority) -> Capacity:
        found = [need(self.lengths[item]) for item in self.in_flight if self.priorities[item] in priorities]
        return sum(found, Capacity(0, 0))

    def check(self) -> None:
        assert self.scheduler.used == self.used(INTERACTIVE, BATCH)
        assert (self.capacity + Capacity(self.ahead, 0)).fits(self.scheduler.used)
        batch = Capacity(for_long_sentences(self.capacity.rows), for_long_sentences(self.capacity.steps))
        assert batch.fits(self.used(BATCH))
        assert self.scheduler.rows(BATCH) == self.used(BATCH).rows


def simulation(chance: random.Random) -> Simulation:
    capacity = Capacity(chance.choice((1, 2, 9, 16)), chance.choice((200, 400, 1000)))
    return Simulation(capacity, chance.choice((0, 3)), chance, chance.choice((0.125, 0.3, 0.5)))


@given(Chance)
def test_whatever_comes_joins_within_the_bounds_and_each_caller_in_order(chance: random.Random) -> None:
    found = simulation(chance)
    for _ in range(chance.randrange(60)):
        found.add_any(chance.choice((INTERACTIVE, BATCH)))
        if chance.random() < 0.3:
            found.decide()
        if found.in_flight and chance.random() < 0.5:
            found.end_one()
    while found.scheduler or found.in_flight:
        found.decide()
        assert found.in_flight, "sentences wait and none is in flight"
        found.end_one()
    assert sorted(found.joined) == list(range(len(found.lengths)))
    assert found.scheduler.used == Capacity(0, 0)
    by_lane = defaultdict(list)
    for item in found.joined:
        by_lane[found.priorities[item], found.callers[item], found.lengths[item] > LONG_STEPS].append(item)
    assert all(items == sorted(items) for items in by_lane.values())


@settings(max_examples=40)
@given(Chance)
def test_neither_priority_starves_while_both_keep_coming(chance: random.Random) -> None:
    found = simulation(chance)
    waiting = {found.add_any(priority) for priority in (INTERACTIVE, BATCH) for _ in range(8)}
    for _ in range(3000):
        for priority in (INTERACTIVE, BATCH):
            while found.scheduler.waiting(priority) < 8:
                found.add_any(priority)
        waiting -= set(found.decide())
        if not waiting:
            return
        assert found.in_flight
        found.end_one()
    raise AssertionError(f"{[(found.priorities[item], found.lengths[item]) for item in waiting]} have not joined")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_callers_of_one_priority_take_turns(callers: list[int]) -> None:
    scheduler: Scheduler[int] = Scheduler(Capacity(1, 100))
    for item, caller in enumerate(callers):
        scheduler.add(item, caller, need(10), NEVER, BATCH)
    left, turns = defaultdict[int, int](int), list[int]()
    for caller in callers:
        left[caller] += 1
    while scheduler:
        (item,) = scheduler.decide(0.0).items
        caller = callers[item]
        if caller in turns:
            since = len(turns) - turns[::-1].index(caller)
            assert {other for other, count in left.items() if count and other != caller} <= set(turns[since:])
        turns.append(caller)
        left[caller] -= 1
        scheduler.release(need(10), BATCH)


def saturated(capacity: Capacity, ahead: int = 0) -> Scheduler[str]:
    scheduler: Scheduler[str] = Scheduler(capacity, ahead)
    for i in range(4 * capacity.rows):
        scheduler.add(f"batch {i}", "bulk", need(20), NEVER, BATCH)
    return scheduler


def test_batch_leaves_an_eighth_and_what_runs_ahead_to_interactive_sentences() -> None:
    scheduler = saturated(Capacity(16, 10_000), ahead=8)
    assert len(scheduler.decide(0.0).items) == 14
    for i in range(30):
        scheduler.add(str(i), "app", need(20), NEVER)
    joined = scheduler.decide(0.0).items
    assert joined == tuple(map(str, range(10)))
    assert scheduler.used.rows == 24


def test_batch_takes_no_row_that_an_interactive_sentence_waits_for_in_the_engine() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(4, 1000), ahead=4)
    for i in range(6):
        scheduler.add(f"app {i}", i, need(20), NEVER)
    assert len(scheduler.decide(0.0).items) == 6  # two of them wait for rows
    scheduler.add("batch", "bulk", need(20), NEVER, BATCH)
    for _ in range(2):
        assert scheduler.decide(0.0).items == ()
        scheduler.release(need(20))
    assert scheduler.decide(0.0).items == ()
    scheduler.release(need(20))
    assert scheduler.decide(0.0).items == ("batch",)


def test_while_interactive_sentences_wait_one_turn_in_eight_is_batchs() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(1, 1000))
    for i in range(40):
        scheduler.add(f"app {i}", i, need(20), NEVER)
        scheduler.add(f"batch {i}", "bulk", need(20), NEVER, BATCH)
    turns = []
    for _ in range(24):
        (item,) = scheduler.decide(0.0).items
        turns.append(BATCH if "batch" in item else INTERACTIVE)
        scheduler.release(need(20), turns[-1])
    assert turns == 3 * [*7 * [INTERACTIVE], BATCH]


def test_what_a_large_batch_sentence_needs_is_kept_for_it_once_it_is_its_turn() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(100, 1000))
    for i in range(50):
        scheduler.add(f"app {i}", i, need(20), NEVER)
    assert len(scheduler.decide(0.0).items) == 50  # all steps are taken
    scheduler.add("batch", "bulk", need(800), NEVER, BATCH)
    for i in range(20):
        scheduler.add(f"later {i}", i, need(20), NEVER)
    joined = list[str]()
    for _ in range(50):
        scheduler.release(need(20))
        joined += scheduler.decide(0.0).items
    assert joined == [*(f"later {i}" for i in range(7)), "batch", *(f"later {i}" for i in range(7, 10))]


def test_a_long_sentence_waits_for_no_later_batch_and_leaves_short_ones_some_of_what_batch_leaves() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(80, 1600))
    for i in range(70):
        scheduler.add(f"batch {i}", "bulk", need(20), NEVER, BATCH)
    assert len(scheduler.decide(0.0).items) == 70
    scheduler.add("long", "documents", need(500), NEVER)
    scheduler.add("short", "app", need(20), NEVER)
    for i in range(70):
        scheduler.add(f"more {i}", "bulk", need(20), NEVER, BATCH)
    assert scheduler.decide(0.0).items == ("short",)  # 200 steps are free, and open to long ones are 175
    n_ended = 0
    while "long" not in (joined := scheduler.decide(0.0).items):
        assert joined == ()
        scheduler.release(need(20), BATCH)
        n_ended += 1
    assert n_ended == 19  # then batch leaves 580 steps, seven eighths of which are open
    assert scheduler.ever_fits(need(1400), BATCH)


@pytest.mark.parametrize(
    ("share", "n_interactive", "expected"),
    [(0.125, 4, 10), (0.3, 4, 24), (0.5, 4, 40), (0.125, 1, 40), (0.125, 2, 26), (0.125, 100, 5), (0.01, 4, 0)],
)
def test_batch_takes_part_in_its_share_of_the_rounds_while_interactive_sentences_run(
    share: float, n_interactive: int, expected: int
) -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(128, 10_000), batch_share=share)
    scheduler.add("batch", 1, need(20), NEVER, BATCH)
    scheduler.decide(0.0)
    assert not any(scheduler.leaves_batch_out() for _ in range(5))
    for number in range(n_interactive):
        scheduler.add(f"app {number}", 2, need(20), NEVER)
    scheduler.decide(0.0)
    rounds = [scheduler.leaves_batch_out() for _ in range(80)]
    assert rounds[0], "an interactive sentence that joins runs at once"
    assert rounds.count(False) == expected
    for _ in range(n_interactive):
        scheduler.release(need(20), INTERACTIVE)
    assert not any(scheduler.leaves_batch_out() for _ in range(5))


def test_interactive_sentences_alone_leave_nothing_out() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(8, 1000))
    scheduler.add("app", 2, need(20), NEVER)
    scheduler.decide(0.0)
    assert not any(scheduler.leaves_batch_out() for _ in range(20))


def test_a_late_batch_sentence_expires_though_it_may_not_join() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(1, 1000))
    scheduler.add("running", 1, need(20), NEVER)
    scheduler.decide(0.0)
    scheduler.add("waiting", 1, need(20), NEVER)
    scheduler.add("late", 2, need(20), 1.0, BATCH)
    assert scheduler.decide(2.0).expired == ("late",)
    assert scheduler.waiting(BATCH) == 0


# ---- the worker -----------------------------------------------------------------------------------------------------


def urgent() -> Call:
    return Call()


def patient(deadline_s: float = NEVER) -> Call:
    return Call(deadline_s, BATCH)


async def test_batch_sentences_are_left_out_of_seven_rounds_in_eight() -> None:
    reports: list[RoundReport] = []
    found = DrivenWorker(FakeEngine(Capacity(32, 10_000), rounds=4), on_round=reports.append)
    late, soon = found.submit(patient(), "a"), [found.submit(urgent(), "b")]
    for _ in range(20):  # as soon as one ends, another one comes
        await found.step()
        if soon[-1].done():
            soon.append(found.submit(urgent(), "b"))
    assert found.engine.groups[:16] == 2 * [*7 * [1], 2]
    assert [report.rows for report in reports[:16]] == 2 * [*7 * [1], 2]
    assert not late.done()
    await found.settle()
    assert reasons([late, *soon]) == {None}
    found.check_nothing_is_left()


async def test_batch_sentences_alone_take_part_in_every_round() -> None:
    found = DrivenWorker(FakeEngine(rounds=4))
    futures = [found.submit(patient(), "a") for _ in range(3)]
    await found.step(4)
    assert found.engine.groups == 4 * [3]
    assert reasons(futures) == {None}


async def test_a_batch_sentence_can_be_cancelled_while_rounds_leave_it_out() -> None:
    found = DrivenWorker(FakeEngine(rounds=4))
    gone, stays, soon = (found.submit(call, "a") for call in (patient(), patient(), urgent()))
    await found.step()
    assert found.engine.groups == [1]
    gone.cancel()
    await delivered()
    await found.step()
    assert found.engine.in_flight == 2
    await found.settle()
    assert reasons([stays, soon]) == {None}
    found.check_nothing_is_left()


async def test_a_batch_sentence_that_waits_too_long_ends_with_its_deadline() -> None:
    now_s = [0.0]
    found = DrivenWorker(FakeEngine(Capacity(1, 100), rounds=4), lambda: now_s[0])
    running = found.submit(urgent(), "a")
    await found.step()
    late = found.submit(patient(deadline_s=5.0), "b")
    now_s[0] = 6.0
    await found.step()
    assert reasons([late]) == {Reason.DEADLINE_EXCEEDED}
    await found.settle()
    assert reasons([running]) == {None}
    found.check_nothing_is_left()


async def test_a_round_fails_for_batch_sentences_too_although_it_leaves_them_out() -> None:
    found = DrivenWorker(FakeEngine(rounds=4))
    late, soon = found.submit(patient(), "a"), found.submit(urgent(), "poison")
    await found.settle()
    assert (reasons([late]), reasons([soon])) == ({None}, {Reason.INTERNAL})
    assert result(late).vectors[0, 0, 0] == ord("a")
    found.check_nothing_is_left()


async def test_rounds_are_bounded_by_time_where_batch_sentences_take_part() -> None:
    """Steps of 1 ms each, so that ten of them are what a round may have."""
    now_s = [0.0]

    class TimedEngine(FakeEngine[Sentence]):
        def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[Sentence]]:
            found = super().advance(leave_out=leave_out, max_steps=max_steps)
            now_s[0] += 0.001 * self.groups[-1]
            return found

    found = DrivenWorker(TimedEngine(rounds=20_000), lambda: now_s[0])
    found.submit(patient(), "a")
    await found.step(10_000)
    assert found.engine.bounds[-1] == pytest.approx(BATCH_ROUND_S / 0.001, abs=1)
    found.submit(urgent(), "b")
    await found.step()
    assert found.engine.bounds[-1] is None


async def test_a_sentence_that_was_left_out_has_the_bits_that_it_has_alone() -> None:
    config = SIZES["tiny"]
    batch = CellularBatch(random_bilm(config), torch.device("cpu"), EngineOptions(max_rows=4, max_tokens=400))
    engine: RecurrentEngine[Sentence] = RecurrentEngine(batch, LstmStateCodec(config, "0" * 16))
    engine.warm_up()
    worker = InferenceWorker(engine)

    async def vectors(call: Call, n_urgent: int) -> NDArray[np.generic]:
        future = worker.submit([new_sentence(call, *(f"w{i}" for i in range(40)))])
        beside = [worker.submit([new_sentence(urgent(), *"abcde")]) for _ in range(n_urgent)]
        for _ in range(1000):
            worker.step()
            await delivered()
            if future.done():
                break
        assert all(each.done() for each in beside)
        return result(future).vectors

    alone = await vectors(urgent(), 0)
    assert np.array_equal(await vectors(patient(), 30), alone)
    assert np.array_equal(await vectors(patient(), 0), alone)
    assert worker.idle
