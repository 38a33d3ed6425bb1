from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.characters import CharacterIds
from bilm_model.config import SIZES
from bilm_model.device import resolve_device
from bilm_model.engine.backend import Backend, Memory
from bilm_model.engine.backends import NewBackend, new_backend
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.planner import Indices, RoundPlan
from bilm_model.engine.sentences import PlainSentence
from bilm_model.errors import CharacterError, ConfigError, ModelError
from bilm_model.kernels.kernel_cache import use_store
from bilm_model.shipped_kernels import RecordedKernels


def engine_of(new_backend: NewBackend = new_backend, **options: int) -> CellularBatch:
    chosen = EngineOptions(**options)  # type: ignore[arg-type]
    return CellularBatch(random_bilm(SIZES["tiny"]), torch.device("cpu"), chosen, new_backend)


def words(n: int) -> PlainSentence:
    return PlainSentence([f"w{i % 50}" for i in range(n)])


def advance(engine: CellularBatch) -> list[int]:
    """Execute a round; let what ended leave."""
    ended = [sentence for sentence, _ in engine.advance()]
    engine.leave(ended)
    return ended


def run_dry(engine: CellularBatch) -> None:
    while engine.n_in_flight:
        advance(engine)


def rounds_until(engine: CellularBatch, sentence: int) -> int:
    n_rounds = 1
    while sentence not in advance(engine):
        n_rounds += 1
    return n_rounds


def test_a_short_sentence_does_not_wait_for_long_ones() -> None:
    engine = engine_of(max_rows=9)
    engine.join([words(3000)] * 8)
    for _ in range(5):
        advance(engine)
        (short,) = engine.join([words(5)])
        assert rounds_until(engine, short) <= 2
    run_dry(engine)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    engine = engine_of(max_rows=1, max_tokens=20)
    assert engine.n_waiting == 4
    with pytest.raises(ValueError, match="1 sentences of 21 tokens and boundaries don't fit: 5 rows, 20 free"):
        engine.join([words(19)])
    with pytest.raises(CharacterError):
        engine.join([words(3), PlainSentence(["a", ""])])
    engine.join([words(1)] * 5)
    with pytest.raises(ValueError, match="0 rows"):
        engine.join([words(1)])
    assert (engine.n_in_flight, engine.free_rows, engine.free_tokens) == (5, 0, 5)
    assert len(advance(engine)) == 5
    assert (engine.n_in_flight, engine.free_rows, engine.free_tokens) == (0, 5, 20)


def test_a_sentence_without_tokens_keeps_its_state() -> None:
    engine = engine_of(max_rows=1, max_tokens=8)
    (before,) = engine.run([words(3)])
    empty = PlainSentence([], (before.h.numpy(), before.c.numpy()))
    found, other, fresh = engine.run([empty, words(6), PlainSentence([])])
    assert found.layers.shape == fresh.layers.shape == (3, 0, 16)
    assert other.layers.shape == (3, 8, 16)
    assert torch.equal(found.h, before.h)
    assert torch.equal(found.c, before.c)
    assert not fresh.h.any()
    assert not fresh.c.any()


def test_the_warm_up_drops_what_is_in_flight_and_finds_numbers_that_are_none() -> None:
    engine = engine_of(max_rows=2)
    engine.join([words(500)])
    engine.advance()
    engine.warm_up()
    assert (engine.n_in_flight, engine.free_rows) == (0, 2 + engine.n_waiting)
    bilm = random_bilm(SIZES["tiny"])
    bilm.encoder.char_cnn.biases[0].data[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        CellularBatch(bilm, torch.device("cpu")).warm_up()


def test_words_seen_before_are_not_encoded_again() -> None:
    engine = engine_of()
    engine.run([words(40)])
    misses = engine.stats.cache.misses
    assert misses == 42
    engine.run([words(40)])
    assert engine.stats.cache.misses == misses
    forgetful = engine_of(token_cache_mib=0)
    for _ in range(2):
        forgetful.run([words(40)])
    assert forgetful.stats.cache.misses == 2 * misses


def test_an_input_cache_that_is_too_small_is_an_error() -> None:
    with pytest.raises(ConfigError, match="input_cache_mib: expected 0 or at least"):
        CellularBatch(random_bilm(SIZES["small"]), torch.device("cpu"), EngineOptions(input_cache_mib=1))


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "mps", ""])
def test_a_device_that_nobody_knows_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"expected auto, cpu, cuda or cuda:N, found '{name}'"):
        resolve_device(name)


Free = tuple[int, int, int, int]


def free(engine: CellularBatch) -> Free:
    """Slots, places, sentences in flight, and how many new tokens a sentence could bring."""
    return engine.free_rows, engine.free_tokens, engine.n_in_flight, engine.free_entries


def state_of(engine: CellularBatch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    (embedded,) = engine.run([words(2)])
    return embedded.h.numpy(), embedded.c.numpy()


class Unfit(Sequence[str]):
    """Tokens that raise while they are read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        raise MemoryError


class Uncopied(np.ndarray[Any, Any]):
    """Numbers that there is no memory to copy."""

    def copy(self, *_: Any, **__: Any) -> Any:
        raise MemoryError


@pytest.mark.parametrize("cache", [0, 1])
@pytest.mark.parametrize(
    "bad",
    [
        "too many steps",
        "too many steps, all different",
        "an empty token",
        "half of a surrogate pair",
        "tokens that can't be read",
        "h of another shape",
        "c of another shape",
        "a scalar as c",
        "a state that can't be copied",
    ],
)
def test_a_sentence_that_cannot_join_leaves_nothing_behind(bad: str, cache: int) -> None:
    engine = engine_of(max_rows=2, max_tokens=20, token_cache_mib=cache)
    h, c = state_of(engine)
    engine.join([words(3)])  # in flight meanwhile: 15 of 20 are free
    sentences = {
        "too many steps": words(11),
        "too many steps, all different": PlainSentence([f"new {i}" for i in range(100_000 if cache else 40)]),
        "an empty token": PlainSentence(["known", "new", ""]),
        "half of a surrogate pair": PlainSentence(["new", "\ud800"]),
        "tokens that can't be read": PlainSentence(Unfit()),
        "h of another shape": PlainSentence(["new"], (h[:, :, 1:], c)),
        "c of another shape": PlainSentence(["new"], (h, c[:1])),
        "a scalar as c": PlainSentence(["new"], (h, np.zeros((), np.float32))),
        "a state that can't be copied": PlainSentence(["new"], (h, c.view(Uncopied))),
    }
    before = free(engine)
    unreadable = any(part in bad for part in ("token", "surrogate", "copied"))
    expected = (CharacterError, MemoryError) if unreadable else ValueError
    for _ in range(30):
        with pytest.raises(expected):
            engine.join([words(1), sentences[bad]])
        assert free(engine) == before
    engine.join([words(13)])  # all of the capacity is still there
    run_dry(engine)
    assert free(engine)[:3] == (2 + engine.n_waiting, 20, 0)


def test_every_row_taken_is_a_refusal_that_leaves_nothing_behind() -> None:
    engine = engine_of(max_rows=1, max_tokens=1000)
    engine.join([words(3)] * engine.free_rows)
    before = free(engine)
    for number in range(600):  # of new tokens, each of which would take an entry
        with pytest.raises(ValueError, match="0 rows"):
            engine.join([PlainSentence([f"{number} {i}" for i in range(20)])])
    assert free(engine) == before


class Full:
    """Cells that can't be written."""

    def index_copy_(self, *_: Any) -> None:
        raise RuntimeError("out of memory, simulated")


class FailingBackend(CpuBackend):
    """A back end that does half of something and then fails, if `failure` says so."""

    failure = ""

    def encode(self, entries: Indices, ids: CharacterIds) -> None:
        if self.failure == "encode":
            raise RuntimeError("simulated")
        super().encode(entries, ids)

    def run(self, plan: RoundPlan, entries: Indices) -> None:
        super().run(plan, entries)
        if self.failure == "run":
            assert self.input_cache is not None
            self.input_cache.projections[...] = float("nan")  # as if they had been noted and not computed
            raise RuntimeError("simulated")
        if self.failure == "other vectors":
            self.memory.outputs.mul_(3.0)


def failing_engine(**options: int) -> tuple[CellularBatch, FailingBackend]:
    made: list[FailingBackend] = []

    def new_failing(bilm: Bilm, memory: Memory, options: EngineOptions) -> Backend:
        assert options.max_rows is not None
        made.append(FailingBackend(bilm, memory, options.max_rows, options.input_cache_bytes))
        return made[-1]

    return engine_of(new_failing, **options), made[0]


def test_a_state_that_cannot_be_written_leaves_nothing_behind() -> None:
    engine, backend = failing_engine(max_rows=1, max_tokens=20)
    state = state_of(engine)
    before = free(engine)
    whole = backend.memory
    backend.memory = replace(whole, c=cast(torch.Tensor, Full()))
    (sentence,) = engine.join([PlainSentence(["a"] * 18, state)])
    with pytest.raises(RuntimeError, match="simulated"):
        engine.advance()
    backend.memory = whole
    engine.drop([sentence])
    assert free(engine) == before
    assert torch.isfinite(engine.run([words(18)])[0].layers).all()


@pytest.mark.parametrize("where", ["encode", "run"])
def test_after_a_round_that_failed_each_sentence_can_be_dropped_and_later_ones_are_right(where: str) -> None:
    (engine, backend), other = failing_engine(max_rows=3, max_tokens=60), engine_of()
    expected = other.run([words(9)])[0].layers
    engine.run([words(2)])
    before = free(engine)
    sentences = engine.join([words(9), words(5), words(3), words(4)])
    backend.failure = where
    with pytest.raises(RuntimeError, match="simulated"):
        engine.advance()
    backend.failure = ""
    for sentence in sentences:
        engine.drop([sentence])
    assert free(engine) == before
    assert torch.equal(engine.run([words(9)])[0].layers, expected)


def test_sentences_are_dropped_wherever_they_are() -> None:
    engine = engine_of(max_rows=2, max_tokens=200)
    before = free(engine)
    running, gone, waiting, stays = engine.join([words(50), words(40), words(5), words(6)])
    engine.drop([waiting])
    advance(engine)
    engine.drop([gone, running])
    assert rounds_until(engine, stays) <= 2
    assert free(engine)[:3] == before[:3]


def test_a_reset_drops_everything() -> None:
    engine = engine_of(max_rows=2, max_tokens=60)
    engine.warm_up()
    before = free(engine)
    engine.join([words(50)])
    engine.advance()
    engine.warm_up()
    assert free(engine) == before


def test_a_reset_loads_no_kernel_again() -> None:
    engine, store = engine_of(max_rows=2, max_tokens=60), RecordedKernels()
    before = use_store(store)
    try:
        engine.reset()
    finally:
        use_store(before)
    assert store.requests == []


@pytest.mark.parametrize("bad", [PlainSentence(["a", ""]), words(19)])
def test_a_run_that_fails_leaves_nothing_in_flight(bad: PlainSentence) -> None:
    engine = engine_of(max_rows=2, max_tokens=20)
    with pytest.raises((CharacterError, ValueError)):
        engine.run([words(3), words(4), bad])
    assert free(engine)[:3] == (2 + engine.n_waiting, 20, 0)
    assert len(engine.run([words(18)])) == 1


def counters(engine: CellularBatch) -> tuple[int, int, int, int]:
    stats = engine.stats
    return stats.ticks, stats.steps, stats.cache.hits, stats.cache.misses


def test_self_checks_count_nothing_and_a_reset_takes_nothing_back() -> None:
    engine = engine_of()
    stats = engine.stats
    engine.warm_up()
    assert counters(engine) == (0, 0, 0, 0)
    engine.run([words(40)])
    counted = counters(engine)
    assert counted == (42, 42, 0, 42)
    for _ in range(3):
        engine.check()
        engine.warm_up()
    assert counters(engine) == counted
    engine.run([words(40)])
    assert counters(engine) == (84, 84, 0, 84)  # a reset empties the cache, and counting goes on
    assert engine.stats is stats


def test_a_self_check_that_fails_ends_uncounted_too() -> None:
    engine, backend = failing_engine()
    engine.warm_up()
    backend.failure = "other vectors"
    with pytest.raises(ModelError, match="other vectors"):
        engine.check()
    backend.failure = ""
    engine.run([words(5)])
    assert counters(engine)[1] == 7
