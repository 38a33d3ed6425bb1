import random
from collections.abc import Sequence

import numpy as np
import pytest
from bilm_model.alphabet import MAX_TOKEN_BYTES
from bilm_model.engine.fastest_loops import Bind, fastest_bind, interpreted, path_of
from bilm_model.engine.lanes import Lanes
from bilm_model.engine.token_table import InputPlaces, TokenTable
from bilm_model.errors import CharacterError
from hypothesis import given
from hypothesis import strategies as st

WAYS = pytest.mark.parametrize("bind", [interpreted, fastest_bind()], ids=path_of)


class Cache:
    """A table and the lanes that say what of it is in use, and what a device would have."""

    def __init__(self, n_places: int, n_cached: int, bind: Bind = interpreted) -> None:
        self.table = TokenTable(n_places + n_cached)
        self.lanes = Lanes(
            self.table, n_lanes=1, n_waiting=30, n_places=n_places, n_cached=n_cached, max_ticks=4, bind=bind
        )
        self.vectors: dict[int, str] = {}
        self.computed: list[str] = []

    def enter(self, *tokens: str) -> tuple[int, list[int]]:
        entries = self.table.entries_of([tokens])
        (sentence,) = self.lanes.enter(entries, [len(entries)], [0])
        return sentence, entries[1:-1]

    def encode(self) -> None:
        missing = self.lanes.unknown()
        assert len(missing) == len(set(missing))
        for entry in missing:
            self.vectors[entry] = self.table.read(entry).decode()
        self.computed += [self.vectors[entry] for entry in missing]
        self.lanes.know(missing)

    def pass_through(self, *tokens: str) -> None:
        sentence, _ = self.enter(*tokens)
        self.encode()
        self.lanes.drop([sentence])


@WAYS
@given(st.integers(0, 9), st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=30), st.randoms())
def test_an_entry_always_holds_its_own_tokens_vector(
    bind: Bind, n_cached: int, sentences: list[list[int]], chance: random.Random
) -> None:
    cache = Cache(40, n_cached, bind)
    in_flight: dict[int, tuple[list[str], Sequence[int]]] = {}
    for sentence in sentences:
        tokens = [f"w{number}" for number in sentence]
        while in_flight and (chance.random() < 0.3 or cache.lanes.n_free_places < len(tokens) + 2):
            gone = chance.choice(sorted(in_flight))
            cache.lanes.drop([gone])
            del in_flight[gone]
        number, entries = cache.enter(*tokens)
        in_flight[number] = tokens, entries
        if chance.random() < 0.7:
            cache.encode()
            for tokens_, entries_ in in_flight.values():
                assert [cache.vectors[entry] for entry in entries_] == tokens_
        assert cache.lanes.n_cached <= n_cached
    cache.lanes.drop(sorted(in_flight))
    assert cache.lanes.n_cached <= n_cached
    assert len(cache.table) == cache.lanes.n_cached
    assert cache.table.n_available + cache.lanes.n_cached == cache.table.capacity


@WAYS
def test_the_least_recently_used_goes(bind: Bind) -> None:
    cache = Cache(10, 6, bind)  # the boundaries are cached, too
    for token in ("a", "b", "c", "d", "a", "e"):
        cache.pass_through(token)
    cache.computed.clear()
    for token in ("a", "c", "d", "e"):
        cache.pass_through(token)
    assert cache.computed == []
    cache.pass_through("b")
    assert cache.computed == ["b"]


def test_without_a_cache_nothing_stays() -> None:
    cache = Cache(10, 0)
    for _ in range(2):
        cache.pass_through("a", "b", "a")
    assert cache.computed == ["<S>", "</S>", "a", "b"] * 2
    assert len(cache.table) == 0


def test_a_token_that_left_before_it_was_encoded_is_not_taken_for_known() -> None:
    cache = Cache(10, 8)
    sentence, _ = cache.enter("a")
    cache.lanes.drop([sentence])
    assert cache.lanes.n_cached == 0
    cache.pass_through("b", "a")
    assert sorted(cache.computed) == ["</S>", "<S>", "a", "b"]


def test_tokens_that_read_the_same_share_an_entry() -> None:
    cache = Cache(20, 0)
    long = "x" * MAX_TOKEN_BYTES
    sentence, (a, b, c, d) = cache.enter(long + "a", long + "b", long[:-1], long)
    assert a == b == d != c
    half = "x" * (MAX_TOKEN_BYTES - 1) + "é"  # cut within a character
    other, (e, f, g) = cache.enter(half + "a", half, half[:-1])
    assert e == f != g
    assert cache.table.read(e) == half.encode()[:MAX_TOKEN_BYTES]
    cache.lanes.drop([sentence, other])
    assert len(cache.table) == 0


@pytest.mark.parametrize("bad", ["", "\ud800"])
def test_a_bad_token_changes_nothing(bad: str) -> None:
    cache = Cache(5, 0)
    for _ in range(9):
        with pytest.raises(CharacterError):
            cache.enter("a", bad)
        assert (len(cache.table), cache.table.unknown) == (0, [])
    assert len(cache.enter("x", "y", "z")[1]) == 3  # there is capacity for all


@WAYS
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=6), max_size=40), st.randoms())
def test_input_projections_are_where_they_were_put(bind: Bind, rounds: list[list[int]], chance: random.Random) -> None:
    places = InputPlaces(20, 6, bind)
    held: dict[int, int] = {}
    order: list[int] = []
    for wanted in rounds:
        entries = np.array(wanted)
        missing, where = places.take(entries)
        assert sorted(missing.tolist()) == sorted(set(wanted) - set(order))
        assert places.places(np.arange(20)).max() < 6
        held.update(zip(where.tolist(), missing.tolist(), strict=True))
        assert [held[place] for place in places.places(entries).tolist()] == wanted
        # The most recently used stay: those of this round last, the ones that had places before the others
        known, new = ([entry for entry in dict.fromkeys(wanted) if (entry in order) == had] for had in (True, False))
        order = [*(entry for entry in order if entry not in wanted), *known, *new][-6:]
        assert places.places(np.array(order)).min() >= 0
        if chance.random() < 0.3:
            gone = np.array([chance.randrange(20)] * 2)
            places.forget(gone)
            assert places.places(gone).tolist() == [-1, -1]
            order = [entry for entry in order if entry != gone[0]]


def test_more_entries_at_a_time_than_ever_before() -> None:
    places = InputPlaces(5000, 5000)
    for n in (10, 1000, 5000):
        missing, where = places.take(np.arange(n).repeat(2).reshape(2, n))
        assert len(missing) == len(set(where.tolist())) == n - {10: 0, 1000: 10, 5000: 1000}[n]
    places.forget(np.arange(5000))
    assert len(places.take(np.arange(5000))[0]) == 5000
