import random
from collections import OrderedDict

import numpy as np
import pytest
from bilm_model.alphabet import MAX_TOKEN_BYTES
from bilm_model.engine.planner import Indices
from bilm_model.engine.token_table import InputPlaces, TokenTable
from bilm_model.errors import CharacterError
from hypothesis import given
from hypothesis import strategies as st


def encode(table: TokenTable, vectors: dict[int, bytes], entries: Indices) -> None:
    """Stands for the device: remembers whose vector is where."""
    missing = table.missing(entries)
    for entry in missing.tolist():
        vectors[entry] = table.key(entry)
    table.encoded(missing)


@given(st.integers(0, 9), st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=30), st.randoms())
def test_an_entry_always_holds_its_own_tokens_vector(
    n_cached: int, sentences: list[list[int]], chance: random.Random
) -> None:
    table = TokenTable(40, n_cached)
    vectors: dict[int, bytes] = {}
    in_flight: list[tuple[list[str], Indices]] = []
    for sentence in sentences:
        tokens = [f"w{number}" for number in sentence]
        while in_flight and (chance.random() < 0.3 or sum(len(t) for t, _ in in_flight) + len(tokens) > 40):
            table.leave(in_flight.pop(chance.randrange(len(in_flight)))[1])
        in_flight.append((tokens, table.enter(tokens)))
        encode(table, vectors, np.concatenate([entries for _, entries in in_flight]))
        for tokens_, entries in in_flight:
            assert [vectors[entry].decode() for entry in entries.tolist()] == tokens_
        assert table.n_cached <= n_cached
    for _, entries in in_flight:
        table.leave(entries)
    assert table.n_cached <= n_cached


def test_the_least_recently_used_goes() -> None:
    table = TokenTable(4, 4)
    for token in ("a", "b", "c", "d"):
        table.leave(table.enter([token]))
    table.leave(table.enter(["a"]))
    table.leave(table.enter(["e"]))  # too many: "b" goes
    known: OrderedDict[str, bool] = OrderedDict()
    for token in ("a", "c", "d", "e"):
        before = table.n_cached
        entries = table.enter([token])
        known[token] = table.n_cached < before
        table.leave(entries)
    assert all(known.values())


def test_without_a_cache_nothing_stays() -> None:
    table = TokenTable(10, 0)
    entries = table.enter(["a", "b", "a"])
    assert entries[0] == entries[2] != entries[1]
    assert sorted(table.missing(entries)) == sorted(set(entries.tolist()))
    assert sorted(table.leave(entries)) == sorted(set(entries.tolist()))
    assert len(table.missing(table.enter(["a"]))) == 1
    assert (table.stats.hits, table.stats.misses) == (1, 3)


def test_tokens_that_read_the_same_share_an_entry() -> None:
    table = TokenTable(10, 0)
    long = "x" * MAX_TOKEN_BYTES
    a, b, c = table.enter([long + "a", long + "b", long[:-1]])
    assert a == b != c


@pytest.mark.parametrize("bad", ["", "\ud800"])
def test_a_bad_token_changes_nothing(bad: str) -> None:
    table = TokenTable(3, 0)
    with pytest.raises(CharacterError):
        table.enter(["a", bad])
    assert len(table.enter(["x", "y", "z"])) == 3  # there is room for all


@given(st.lists(st.sets(st.integers(0, 19), min_size=1, max_size=6), max_size=40), st.randoms())
def test_input_projections_are_where_they_were_put(rounds: list[set[int]], chance: random.Random) -> None:
    places = InputPlaces(20, 6)
    held: dict[int, int] = {}
    for wanted in rounds:
        entries = np.array(sorted(wanted))
        missing, where = places.take(entries)
        held.update(zip(where.tolist(), missing.tolist(), strict=True))
        assert [held[place] for place in places.places(entries).tolist()] == entries.tolist()
        if chance.random() < 0.3:
            gone = np.array([chance.randrange(20)])
            places.forget(gone)
            assert places.places(gone) == [-1]
    recent = np.array(sorted(rounds[-1])) if rounds else np.zeros(0, dtype=np.int64)
    assert len(places.take(recent)[0]) <= len(recent)
