from collections import defaultdict

from bilm_model.engine.types import Capacity
from bilm_server.inference.scheduler import LONG_STEPS, Decision, Scheduler
from hypothesis import given
from hypothesis import strategies as st

NEVER = float("inf")
Waiting = st.lists(st.tuples(st.integers(0, 3), st.one_of(st.integers(0, 40), st.integers(100, 300))), max_size=40)


def need(n_steps: int) -> Capacity:
    return Capacity(1 if n_steps else 0, n_steps)


def scheduler_of(waiting: list[tuple[int, int]], room: Capacity) -> Scheduler[int]:
    scheduler: Scheduler[int] = Scheduler(room)
    for item, (caller, n_steps) in enumerate(waiting):
        scheduler.add(item, caller, need(n_steps), NEVER)
    return scheduler


@given(Waiting, st.integers(1, 9), st.integers(400, 1000), st.randoms(use_true_random=False))
def test_everyone_joins_within_the_room_and_each_caller_in_order(
    waiting: list[tuple[int, int]], rows: int, steps: int, chance: object
) -> None:
    scheduler = scheduler_of(waiting, Capacity(rows, steps))
    in_flight: list[int] = []
    joined: list[int] = []
    while scheduler or in_flight:
        decision = scheduler.decide(0.0)
        joined += decision.items
        in_flight += decision.items
        assert in_flight, "nothing in flight and nobody let in"
        lengths = [waiting[item][1] for item in in_flight]
        assert sum(lengths) <= steps
        assert sum(1 for n in lengths if n) <= rows
        assert scheduler.used == Capacity(sum(1 for n in lengths if n), sum(lengths))
        gone = in_flight.pop(chance.randrange(len(in_flight)))  # type: ignore[attr-defined]
        scheduler.release(need(waiting[gone][1]))
    assert sorted(joined) == list(range(len(waiting)))
    assert scheduler.used == Capacity(0, 0)
    by_lane = defaultdict(list)
    for item in joined:
        by_lane[waiting[item][0], waiting[item][1] > LONG_STEPS].append(item)
    assert all(items == sorted(items) for items in by_lane.values())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 40)), max_size=40))
def test_no_caller_gets_two_turns_while_another_waits_for_one(waiting: list[tuple[int, int]]) -> None:
    scheduler = scheduler_of(waiting, Capacity(1, 100))  # one sentence at a time
    remaining: dict[int, int] = defaultdict(int)
    for caller, _ in waiting:
        remaining[caller] += 1
    turns: list[int] = []
    while scheduler:
        (item,) = scheduler.decide(0.0).items
        caller, n_steps = waiting[item]
        since = turns[::-1].index(caller) if caller in turns else None
        if since is not None:
            between = set(turns[len(turns) - since :])
            assert {c for c, left in remaining.items() if left and c != caller} <= between
        turns.append(caller)
        remaining[caller] -= 1
        scheduler.release(need(n_steps))


def test_long_sentences_leave_room_for_short_ones() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(16, 100_000))
    for i in range(40):
        scheduler.add(f"long {i}", "documents", need(2000), NEVER)
    assert len(scheduler.decide(0.0).items) == 14
    scheduler.add("short", "app", need(12), NEVER)
    assert scheduler.decide(0.0).items == ("short",)


def test_short_sentences_do_not_starve_a_long_one() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(8, 1000))
    for i in range(8):
        scheduler.add(f"short {i}", "app", need(100), NEVER)
    assert len(scheduler.decide(0.0).items) == 8
    scheduler.add("long", "documents", need(800), NEVER)
    scheduler.add("short", "app", need(100), NEVER)
    for _ in range(5):
        scheduler.release(need(100))
        assert scheduler.decide(0.0).items == ()  # the long one's turn: nobody takes what it waits for
    scheduler.release(need(100))
    assert scheduler.decide(0.0).items == ("long",)
    scheduler.release(need(100))
    assert scheduler.decide(0.0).items == ("short",)


def test_who_waits_for_other_long_ones_lets_short_ones_pass() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(8, 1000))
    scheduler.add("long", 1, need(600), NEVER)
    scheduler.add("longer", 2, need(700), NEVER)
    scheduler.add("short", 3, need(20), NEVER)
    assert scheduler.decide(0.0).items == ("long", "short")
    scheduler.release(need(600))
    assert scheduler.decide(0.0).items == ("longer",)


def test_a_caller_with_long_ones_has_its_turn_before_the_thousandth_of_another() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(1, 1000))
    for i in range(100):
        scheduler.add(f"short {i}", "bulk", need(10), NEVER)
    scheduler.add("long", "documents", need(200), NEVER)
    joined: list[str] = []
    for _ in range(3):
        joined += scheduler.decide(0.0).items
        scheduler.release(need(200 if joined[-1] == "long" else 10))
    assert "long" in joined


def test_what_is_late_is_handed_out_apart_and_takes_no_room() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(1, 10))
    scheduler.add("late", 1, need(9), 5.0)
    scheduler.add("good", 2, need(9), 5.1)
    assert scheduler.decide(5.0) == Decision(("good",), ("late",))
    assert not scheduler
    scheduler.add("late without room", 1, need(9), 5.0)
    assert scheduler.decide(6.0) == Decision((), ("late without room",))


def test_a_caller_that_left_leaves_nothing() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(9, 1000))
    for item, caller, n_steps in (("a", 1, 2), ("b", 2, 2), ("c", 1, 2), ("d", 1, 500)):
        scheduler.add(item, caller, need(n_steps), NEVER)
    assert len(scheduler) == 4
    assert all(scheduler.remove(item, 1) for item in ("a", "d", "c"))
    assert not scheduler.remove("b", 1)
    assert not scheduler.remove("b", "unknown")
    assert len(scheduler) == 1
    assert scheduler.decide(0.0).items == ("b",)
    assert not scheduler
    assert scheduler.decide(0.0).items == ()


def test_what_can_never_join_is_known_before_it_waits() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(8, 1000))
    assert scheduler.ever_fits(need(LONG_STEPS))
    assert scheduler.ever_fits(need(875))
    assert not scheduler.ever_fits(need(876))  # an eighth is closed to long sentences
    scheduler.add("long", 1, need(800), NEVER)
    scheduler.decide(0.0)
    assert scheduler.ever_fits(need(875))


def test_draining_takes_everything() -> None:
    scheduler: Scheduler[str] = Scheduler(Capacity(1, 1000))
    for item, n_steps in (("a", 2), ("b", 2), ("c", 500)):
        scheduler.add(item, 1, need(n_steps), NEVER)
    assert set(scheduler.drain()) == {"a", "b", "c"}
    assert not scheduler
    assert len(scheduler) == 0


@given(Waiting, st.randoms(use_true_random=False))
def test_single_sentences_can_be_taken_out_wherever_they_wait(waiting: list[tuple[int, int]], chance: object) -> None:
    scheduler = scheduler_of(waiting, Capacity(3, 1000))
    left = set(range(len(waiting)))
    for item, (caller, _) in enumerate(waiting):
        if chance.random() < 0.5:  # type: ignore[attr-defined]
            assert scheduler.remove(item, caller)
            assert not scheduler.remove(item, caller)
            left.remove(item)
        assert len(scheduler) == len(left)
    joined: set[int] = set()
    while scheduler:
        for item in scheduler.decide(0.0).items:
            joined.add(item)
            scheduler.release(need(waiting[item][1]))
    assert joined == left
    assert scheduler.used == Capacity(0, 0)


def test_short_sentences_run_ahead_and_long_ones_leave_them_rows() -> None:
    scheduler: Scheduler[int] = Scheduler(Capacity(8, 10_000), ahead=3)
    for item in range(20):
        scheduler.add(item, item, need(LONG_STEPS + 1), NEVER)
    assert len(scheduler.decide(0.0).items) == 7  # of 8 rows, not of 11 sentences
    for item in range(20, 40):
        scheduler.add(item, item, need(5), NEVER)
    assert len(scheduler.decide(0.0).items) == 4
    assert scheduler.used.rows == 11
    for _ in range(7):
        scheduler.release(need(LONG_STEPS + 1))
    assert len(scheduler.decide(0.0).items) == 7
