"""Turns of engines that share a device: shares follow weights, and nobody starves."""

from bilm_server.inference.turns import Turns
from hypothesis import given
from hypothesis import strategies as st

WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)


def times_of(weights: list[float], lengths: list[float], rounds: int) -> list[float]:
    """How long each of several that always have work computes, with rounds of these lengths."""
    turns, had = Turns[int](), [0.0] * len(weights)
    for item, weight in enumerate(weights):
        turns.add(item, weight)
    for _ in range(rounds):
        item = turns.next(range(len(weights)))
        had[item] += lengths[item]
        turns.took(item, lengths[item])
    return had


@given(WEIGHTS, st.data())
def test_shares_follow_weights_within_a_round(weights: list[float], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.floats(0.001, 0.1), min_size=len(weights), max_size=len(weights)))
    had = times_of(weights, lengths, 500)
    levels = [time / weight for time, weight in zip(had, weights, strict=True)]
    assert (
        max(levels) - min(levels)
        <= max(length / weight for length, weight in zip(lengths, weights, strict=True)) + 1e-9
    )


def test_who_comes_back_is_owed_nothing_and_owes_nothing() -> None:
    turns = Turns[str]()
    turns.add("a", 1.0)
    turns.add("b", 1.0)
    for _ in range(100):
        assert turns.next(["a"]) == "a"
        turns.took("a", 1.0)
    found = []
    for _ in range(10):
        found.append(turns.next(["a", "b"]))
        turns.took(found[-1], 1.0)
    assert sorted(found) == ["a"] * 5 + ["b"] * 5


def test_who_comes_anew_begins_beside_the_others() -> None:
    turns = Turns[str]()
    turns.add("a", 1.0)
    turns.add("b", 1.0)
    for _ in range(100):
        turns.took(turns.next(["a", "b"]), 1.0)
    turns.add("c", 1.0)
    found = []
    for _ in range(30):
        found.append(turns.next(["a", "b", "c"]))
        turns.took(found[-1], 1.0)
    assert {name: found.count(name) for name in "abc"} == {"a": 10, "b": 10, "c": 10}
    turns.remove("a")
    assert {turns.next(["b", "c"]) for _ in range(3)} <= {"b", "c"}


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=200))
def test_nobody_with_work_waits_for_more_than_one_turn_of_each_other(ready: list[set[int]]) -> None:
    """With equal weights and equal turns, whatever the others do."""
    turns, waited = Turns[int](), dict.fromkeys(range(4), 0)
    for item in range(4):
        turns.add(item, 1.0)
    for present in ready:
        chosen = turns.next(sorted(present))
        turns.took(chosen, 1.0)
        for item in range(4):
            waited[item] = waited[item] + 1 if item in present and item != chosen else 0
        assert max(waited.values()) <= 6
