import pytest
import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.device import resolve_device
from bilm_model.engine.engine import EmbeddedSentence, Engine, EngineOptions, Sentence, Ticket
from bilm_model.errors import CharacterError, ConfigError, ModelError


def engine_of(**options: int) -> Engine:
    return Engine(random_bilm(SIZES["tiny"]), torch.device("cpu"), EngineOptions(**options))  # type: ignore[arg-type]


def words(n: int) -> Sentence:
    return Sentence([f"w{i % 50}" for i in range(n)])


def rounds_until(engine: Engine, ticket: Ticket) -> int:
    n_rounds = 1
    while ticket not in dict(engine.advance()):
        n_rounds += 1
    return n_rounds


def test_a_short_sentence_does_not_wait_for_the_results_of_long_ones() -> None:
    engine = engine_of(max_rows=9)
    for _ in range(8):
        engine.join(words(3000))
    short = None
    while engine.n_in_flight == 8:
        engine.advance()
        running = [ticket for ticket in engine._flight.tickets if ticket.remaining]
        if short is None and running and running[0].done > 2950:
            short = engine.join(words(5))
            assert rounds_until(engine, short) <= 3
    assert short is not None
    while engine.n_in_flight:
        engine.advance()
    assert engine.free_rows == 9


def test_results_of_many_long_sentences_come_one_by_one() -> None:
    engine = engine_of(max_rows=4)
    for _ in range(4):
        engine.join(words(3000))
    counts: list[int] = []
    while engine.n_in_flight:
        counts.append(len(engine.advance()))
    assert counts[-4:] == [1, 1, 1, 1]


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    engine = engine_of(max_rows=1, max_tokens=20)
    with pytest.raises(ValueError, match="21 tokens and boundaries don't fit"):
        engine.join(words(19))
    engine.join(words(18))
    with pytest.raises(ValueError, match="0 rows"):
        engine.join(words(1))
    with pytest.raises(CharacterError):
        engine.join(Sentence(["a", ""]))
    assert (engine.n_in_flight, engine.free_rows, engine.free_tokens) == (1, 0, 0)
    (embedded,) = (embedded for _, embedded in engine.advance())
    assert embedded.layers.shape == (3, 20, 16)
    assert (engine.n_in_flight, engine.free_rows, engine.free_tokens) == (0, 1, 20)


def test_a_sentence_without_tokens_takes_no_room_and_keeps_its_state() -> None:
    engine = engine_of(max_rows=1, max_tokens=8)
    (before,) = engine.run([words(3)])
    engine.join(words(6))
    ticket = engine.join(Sentence([], (before.h.numpy(), before.c.numpy())))
    found: dict[Ticket, EmbeddedSentence] = dict(engine.advance())
    assert found[ticket].layers.shape == (3, 0, 16)
    assert torch.equal(found[ticket].h, before.h)
    assert torch.equal(found[ticket].c, before.c)
    gone = engine.join(Sentence([]))
    engine.leave(gone)
    assert engine.n_in_flight == 0


def test_the_warm_up_drops_what_is_in_flight_and_finds_numbers_that_are_none() -> None:
    engine = engine_of(max_rows=2)
    engine.join(words(500))
    engine.advance()
    engine.warm_up()
    assert (engine.n_in_flight, engine.free_rows) == (0, 2)
    bilm = random_bilm(SIZES["tiny"])
    bilm.encoder.char_cnn.biases[0].data[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        Engine(bilm, torch.device("cpu")).warm_up()


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
        Engine(random_bilm(SIZES["small"]), torch.device("cpu"), EngineOptions(input_cache_mib=1))


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "mps", ""])
def test_a_device_that_nobody_knows_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"expected auto, cpu, cuda or cuda:N, found '{name}'"):
        resolve_device(name)
