"""The compiled planner against a plain one: who has which lane at which tick, what is read and written there."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from bilm_model.engine.fastest_loops import Bind, fastest_bind, interpreted, path_of
from bilm_model.engine.lanes import Lanes
from bilm_model.engine.loops import BROUGHT, DEFERRABLE, FEW_LANES, RETURNED
from bilm_model.engine.planner import Round
from bilm_model.engine.token_table import TokenTable
from hypothesis import given, settings
from hypothesis import strategies as st

WAYS = pytest.mark.parametrize("bind", [interpreted, fastest_bind()], ids=path_of)
PLACES, CACHED = 300, 7
Step = tuple[int, int]
"""A sentence, and which of its steps."""


@dataclass
class Known:
    """A sentence of the plain planner."""

    number: int
    length: int
    flags: int
    done: int = 0

    @property
    def deferrable(self) -> bool:
        return bool(self.flags & DEFERRABLE)


@dataclass
class PlainPlanner:
    """The rules, without arrays."""

    n_lanes: int
    max_ticks: int
    waiting: list[Known] = field(default_factory=list)
    lanes: dict[int, Known] = field(default_factory=dict)

    def may_follow(self, leave_out: bool) -> bool:
        if not self.waiting or self.waiting[0].flags & BROUGHT:
            return False
        return not (leave_out and self.waiting[0].deferrable)

    def plan(
        self, block_rows: int, leave_out: bool
    ) -> tuple[list[dict[int, tuple[Step, bool]]], list[Step], list[Step]]:
        """Return what each lane does at each tick, and whether from zeros; who brings a state where; who ends where."""
        ticks: list[dict[int, tuple[Step, bool]]] = []
        brought, ended, held = list[Step](), list[Step](), set[int]()
        for lane in range(self.n_lanes):
            if lane not in self.lanes and self.waiting:
                self.lanes[lane] = self.waiting.pop(0)
                if self.lanes[lane].flags & BROUGHT:
                    brought.append((self.lanes[lane].number, lane))
        if not self.lanes:
            return ticks, brought, ended
        leave_out = leave_out and not all(each.deferrable for each in self.lanes.values())
        aside = {lane: each for lane, each in self.lanes.items() if leave_out and each.deferrable}
        running = {lane: each for lane, each in self.lanes.items() if lane not in aside}
        n_ticks = max(1, min(self.max_ticks, block_rows // len(running)))
        if len(running) <= FEW_LANES:
            follows = self.may_follow(leave_out)
            ends = [each for each in running.values() if not follows or each.flags & RETURNED]
            n_ticks = min([n_ticks, *(each.length - each.done for each in ends)])
        began = sorted(running)
        for tick in range(n_ticks):
            for lane in began if tick else ():
                if lane in running or lane in held or not self.may_follow(leave_out):
                    continue
                running[lane] = self.waiting.pop(0)
            held |= {lane for lane in began if lane not in running}  # one that is idle stays idle
            now: dict[int, tuple[Step, bool]] = {}
            for lane, each in list(running.items()):
                now[lane] = (each.number, each.done), each.done == 0 and not each.flags & BROUGHT
                each.done += 1
                if each.done == each.length:
                    ended.append((each.number, lane))
                    del running[lane]
                    if each.flags & RETURNED:
                        held.add(lane)
            if now:
                ticks.append(now)
        self.lanes = running | aside
        return ticks, brought, ended


class Both:
    """Sentences that go through both planners."""

    def __init__(self, bind: Bind, n_lanes: int, max_ticks: int) -> None:
        self.table = TokenTable(PLACES + CACHED)
        self.lanes = Lanes(
            self.table, n_lanes=n_lanes, n_waiting=6, n_places=PLACES, n_cached=CACHED, max_ticks=max_ticks, bind=bind
        )
        self.plain = PlainPlanner(n_lanes, max_ticks)
        self.tokens: dict[int, list[int]] = {}
        self.of_place: dict[int, Step] = {}

    def enter(self, lengths: Sequence[int], flags: Sequence[int], chance: random.Random) -> None:
        texts = [[f"w{chance.randrange(9)}" for _ in range(length - 2)] for length in lengths]
        entries = self.table.entries_of(texts)
        numbers = self.lanes.enter(entries, lengths, flags)
        for number, length, flag in zip(numbers, lengths, flags, strict=True):
            assert number not in self.tokens
            self.tokens[number], entries = entries[:length], entries[length:]
            steps = self.lanes.steps([number])
            assert steps.counts.tolist() == [length]
            assert steps.entries.tolist() == self.tokens[number]
            self.of_place |= {place: (number, at) for at, place in enumerate(steps.places.tolist())}
            self.plain.waiting.append(Known(number, length, flag))

    def check_round(self, block_rows: int, leave_out: bool) -> list[int]:
        """Plan with both; return what ended."""
        ticks, brought, ended = self.plain.plan(block_rows, leave_out)
        found = self.lanes.plan(block_rows, leave_out=leave_out)
        if not ticks:
            assert found is None
            return []
        assert found is not None
        assert found.brought == brought
        assert sorted(found.ended) == sorted(ended)
        self.check_steps(found, ticks)
        return [sentence for sentence, _ in found.ended]

    def check_steps(self, found: Round, ticks: list[dict[int, tuple[Step, bool]]]) -> None:
        plan, first = found.plan, 0
        assert plan.sizes == tuple(map(len, ticks))
        last: dict[int, int] = {}
        for now in ticks:
            rows = plan.slots[: len(now)].tolist()
            assert sorted(rows) == sorted(now)
            for row, lane in enumerate(rows):
                ((sentence, done), fresh), step = now[lane], first + row
                back = len(self.tokens[sentence]) - 1 - done
                places = [self.of_place[place] for place in plan.places[:, step].tolist()]
                assert places == [(sentence, done), (sentence, back)]
                entries = self.tokens[sentence]
                assert found.entries[:, step].tolist() == [entries[done], entries[back]]
                assert bool(plan.fresh[step]) == fresh
                last[row] = step
            first += len(now)
        assert first == plan.places.shape[1] == len(plan.fresh)
        assert plan.last.tolist() == [last[row] for row in range(len(plan.slots))]

    def leave(self, sentences: list[int]) -> None:
        self.lanes.leave(sentences)
        self.forget(sentences)

    def drop(self, sentences: list[int]) -> None:
        self.lanes.drop(sentences)
        self.forget(sentences)
        plain = self.plain
        plain.waiting = [each for each in plain.waiting if each.number not in sentences]
        plain.lanes = {lane: each for lane, each in plain.lanes.items() if each.number not in sentences}

    def forget(self, sentences: list[int]) -> None:
        for sentence in sentences:
            del self.tokens[sentence]
        self.of_place = {place: step for place, step in self.of_place.items() if step[0] in self.tokens}


@WAYS
@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_both_planners_agree(bind: Bind, n_lanes: int, max_ticks: int, chance: random.Random) -> None:
    both = Both(bind, n_lanes, max_ticks)
    for turn in range(40):
        lengths = [chance.choice((3, 3, 4, 5, 9, 20)) for _ in range(chance.randrange(min(both.lanes.n_free, 4) + 1))]
        if turn < 30 and lengths and sum(lengths) <= both.lanes.n_free_places:
            states = [chance.choice((0, 0, 0, BROUGHT, RETURNED, BROUGHT | RETURNED)) for _ in lengths]
            both.enter(lengths, [flags | chance.choice((0, 0, DEFERRABLE)) for flags in states], chance)
        ended = both.check_round(chance.choice((1, 7, 40, 10_000)), chance.random() < 0.5)
        both.lanes.know(both.lanes.unknown())
        both.leave(chance.sample(ended, len(ended)))
        if both.tokens and chance.random() < 0.2:
            both.drop(chance.sample(sorted(both.tokens), chance.randrange(1, len(both.tokens) + 1)))
        if turn >= 30 and not both.tokens:
            break
    while both.tokens:
        both.leave(both.check_round(10_000, leave_out=True))
    assert (both.lanes.n_free, both.lanes.n_free_places) == (both.lanes.n_sentences, PLACES)
    assert both.lanes.n_cached <= CACHED


def lanes_of(n_lanes: int, lengths: Sequence[int], flags: int = 0, **limits: int) -> Lanes:
    table = TokenTable(1000)
    limits = {"n_waiting": 8, "n_places": 1000, "n_cached": 0, "max_ticks": 32} | limits
    lanes = Lanes(table, n_lanes=n_lanes, bind=fastest_bind(), **limits)
    lanes.enter(table.entries_of([["a"] * (length - 2) for length in lengths]), lengths, [flags] * len(lengths))
    return lanes


@pytest.mark.parametrize(("n_rows", "expected"), [(1, 32), (4, 32), (8, 16), (100, 1), (128, 1), (200, 1)])
def test_few_lanes_take_many_ticks_together(n_rows: int, expected: int) -> None:
    found = lanes_of(n_rows, [50] * n_rows, n_places=10_000).plan(block_rows=128)
    assert found is not None
    assert len(found.plan.sizes) == expected


def test_few_lanes_end_a_round_with_the_first_sentence_that_ends_unless_others_wait() -> None:
    alone, followed = lanes_of(2, [20, 7]).plan(1000), lanes_of(2, [20, 7, 9]).plan(1000)
    assert alone is not None
    assert followed is not None
    assert (len(alone.plan.sizes), len(followed.plan.sizes)) == (7, 20)
    assert followed.plan.sizes == (2,) * 16 + (1,) * 4
    many = lanes_of(FEW_LANES + 1, [20] * FEW_LANES + [7]).plan(1000)
    assert many is not None
    assert many.plan.sizes == (FEW_LANES + 1,) * 7 + (FEW_LANES,) * 13


@pytest.mark.parametrize("flags", [BROUGHT, RETURNED])
def test_few_lanes_end_a_round_where_a_state_keeps_the_next_sentence_waiting(flags: int) -> None:
    found = lanes_of(2, [20, 7, 9], flags=flags).plan(1000)
    assert found is not None
    assert found.plan.sizes == (2,) * 7


def test_a_lane_takes_the_next_sentence_in_the_tick_after_its_last_one_ended() -> None:
    found = lanes_of(1, [3, 4, 5]).plan(1000)
    assert found is not None
    assert found.plan.sizes == (1,) * 12
    assert np.flatnonzero(found.plan.fresh).tolist() == [0, 3, 7]
    assert len(found.ended) == 3


def test_a_lane_keeps_a_state_that_is_returned_to_the_end_of_the_round() -> None:
    lanes = lanes_of(1, [3, 4], flags=RETURNED)
    for length in (3, 4):
        found = lanes.plan(1000)
        assert found is not None
        assert len(found.plan.sizes) == length
        assert len(found.ended) == 1


def test_what_is_left_out_keeps_its_lane_and_its_place_and_runs_where_nothing_else_does() -> None:
    lanes = lanes_of(3, [20, 20], flags=DEFERRABLE)
    first = lanes.plan(4)
    assert first is not None
    (urgent,) = lanes.enter([0] * 5, [5], [0])
    alone = lanes.plan(1000, leave_out=True)
    assert alone is not None
    assert (alone.plan.slots.tolist(), alone.plan.sizes, alone.ended) == ([2], (1,) * 5, [(urgent, 2)])
    lanes.leave([urgent])
    rest = lanes.plan(1000, leave_out=True)
    assert rest is not None
    assert rest.plan.sizes == (2,) * 18
    assert not rest.plan.fresh.any()


def test_a_sentence_that_is_left_out_takes_no_lane_over_within_a_round() -> None:
    lanes = lanes_of(1, [4])
    lanes.enter([0] * 3, [3], [DEFERRABLE])
    for leave_out, expected in ((True, (1,) * 4), (True, (1,) * 3)):
        found = lanes.plan(1000, leave_out=leave_out)
        assert found is not None
        assert found.plan.sizes == expected


def test_without_sentences_there_is_no_round() -> None:
    assert lanes_of(2, []).plan(1000) is None


@WAYS
@pytest.mark.parametrize("twice", [Lanes.drop, Lanes.leave])
def test_what_has_left_already_leaves_nothing_else_behind(bind: Bind, twice: Callable[..., object]) -> None:
    table = TokenTable(60)
    lanes = Lanes(table, n_lanes=1, n_waiting=2, n_places=60, n_cached=0, max_ticks=9, bind=bind)
    entries = table.entries_of([["a", "b"], ["c"]])
    gone, stays = lanes.enter(entries, [4, 3], [0, 0])
    lanes.drop([gone, gone])
    twice(lanes, [gone])
    twice(lanes, [next(number for number in range(3) if number not in {gone, stays})])  # it has never entered
    assert (lanes.n_free, lanes.n_free_places, lanes.n_in_flight) == (2, 57, 1)
    found = lanes.plan(1000)
    assert found is not None
    assert [sentence for sentence, _ in found.ended] == [stays]
    lanes.leave([stays])
    assert (lanes.n_free, lanes.n_free_places, len(table)) == (3, 60, 0)
