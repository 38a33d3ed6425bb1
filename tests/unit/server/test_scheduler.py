from collections import defaultdict

from bilm_server.scheduler import Scheduler
from hypothesis import given
from hypothesis import strategies as st

NEVER = float("inf")
Waiting = st.lists(st.tuples(st.integers(0, 3), st.integers(2, 40)), max_size=40)


@given(Waiting, st.integers(1, 60))
def test_nothing_is_lost_and_batches_stay_in_budget(waiting: list[tuple[int, int]], budget: int) -> None:
    scheduler: Scheduler[int] = Scheduler(budget)
    for item, (caller, rows) in enumerate(waiting):
        scheduler.add(item, caller, rows, NEVER)
    done: list[int] = []
    while scheduler:
        batch = scheduler.next_batch(0.0)
        assert batch.items
        assert len(batch.items) == 1 or sum(waiting[item][1] for item in batch.items) <= budget
        done += batch.items
    assert sorted(done) == list(range(len(waiting)))
    by_caller = defaultdict(list)
    for item in done:
        by_caller[waiting[item][0]].append(item)
    assert all(items == sorted(items) for items in by_caller.values())  # each caller's in order


@given(Waiting)
def test_no_caller_gets_two_turns_while_another_waits_for_one(waiting: list[tuple[int, int]]) -> None:
    scheduler: Scheduler[int] = Scheduler(1)  # one sentence a batch
    for item, (caller, rows) in enumerate(waiting):
        scheduler.add(item, caller, rows, NEVER)
    remaining: dict[int, int] = defaultdict(int)
    for caller, _ in waiting:
        remaining[caller] += 1
    turns: list[int] = []
    while scheduler:
        caller = waiting[scheduler.next_batch(0.0).items[0]][0]
        since = turns[::-1].index(caller) if caller in turns else None
        if since is not None:
            between = set(turns[len(turns) - since :])
            assert {c for c, left in remaining.items() if left and c != caller} <= between
        turns.append(caller)
        remaining[caller] -= 1


def test_a_long_sentence_is_not_passed_over() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    for item, caller, rows in (("a", 1, 6), ("long", 2, 100), ("b", 3, 2)):
        scheduler.add(item, caller, rows, NEVER)
    assert [scheduler.next_batch(0.0).items for _ in range(3)] == [("a",), ("long",), ("b",)]


def test_what_is_late_is_handed_out_apart_and_costs_no_room() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    scheduler.add("late", 1, 9, 5.0)
    scheduler.add("good", 2, 9, 5.1)
    batch = scheduler.next_batch(5.0)
    assert (batch.items, batch.expired) == (("good",), ("late",))
    assert not scheduler


def test_a_caller_that_left_leaves_nothing() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    scheduler.add("a", 1, 2, NEVER)
    scheduler.add("b", 2, 2, NEVER)
    scheduler.add("c", 1, 2, NEVER)
    scheduler.discard(1)
    scheduler.discard("unknown")
    assert scheduler.next_batch(0.0).items == ("b",)
    assert not scheduler
    assert scheduler.next_batch(0.0).items == ()
