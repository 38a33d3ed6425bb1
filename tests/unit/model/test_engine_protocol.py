"""What the worker relies on in an `Engine`: the engine that ships, and two toys, one recurrent, one without states."""

import numpy as np
import pytest
import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import ALL_LAYERS, PlainSentence
from bilm_model.engine.state import LstmStateCodec
from bilm_model.engine.types import Capacity, Engine, EngineResult, OutputSpec
from bilm_model.errors import CharacterError, StateError
from bilm_model.scalar_mix import Selection

from tests.support.engines import SumEngine, WholeEngine, token_value

Sentences = Engine[PlainSentence]

CAPACITY = Capacity(4, 60)


def lstm() -> Sentences:
    config = SIZES["tiny"]
    options = EngineOptions(max_rows=CAPACITY.rows, max_tokens=CAPACITY.steps)
    batch = CellularBatch(random_bilm(config), torch.device("cpu"), options)
    return RecurrentEngine(batch, LstmStateCodec(config, "0" * 16))


@pytest.fixture(params=[lstm, lambda: SumEngine(CAPACITY), lambda: WholeEngine(CAPACITY)], ids=["LSTM", "sum", "whole"])
def engine(request: pytest.FixtureRequest) -> Sentences:
    made: Sentences = request.param()
    made.warm_up()
    return made


def words(*tokens: str, **fields: object) -> PlainSentence:
    return PlainSentence(tokens, **fields)  # type: ignore[arg-type]


def until_empty(engine: Sentences) -> dict[PlainSentence, EngineResult[PlainSentence]]:
    found: dict[PlainSentence, EngineResult[PlainSentence]] = {}
    for _ in range(1000):
        if not engine.in_flight:
            return found
        for result in engine.advance():
            assert result.sentence not in found, "each sentence ends once"
            found[result.sentence] = result
    raise AssertionError("sentences stay in flight")


def alone(engine: Sentences, sentence: PlainSentence) -> np.ndarray:
    engine.join([sentence])
    vectors: np.ndarray = until_empty(engine)[sentence].vectors
    return vectors


def test_every_sentence_comes_back_once_with_its_own_vectors(engine: Sentences) -> None:
    sentences = [words("a"), words("b", "c", "d"), words("e", "f")]
    engine.join(sentences[:1])
    engine.join(sentences[1:])
    assert engine.in_flight == 3
    needs = [engine.need(len(sentence.tokens)) for sentence in sentences]
    assert engine.used == sum(needs, Capacity(0, 0))
    found = until_empty(engine)
    assert set(found) == set(sentences)
    assert engine.used == Capacity(0, 0)
    for sentence in sentences:
        assert found[sentence].vectors.shape[-2] == len(sentence.tokens)
        assert np.array_equal(found[sentence].vectors, alone(engine, sentence))


def test_the_output_is_as_asked_for(engine: Sentences) -> None:
    pooled = words("a", "b", output=OutputSpec(Selection("top", "mean"), "float16"))
    engine.join([pooled])
    vectors = until_empty(engine)[pooled].vectors
    assert (vectors.ndim, vectors.dtype) == (1, np.dtype("<f2"))
    assert alone(engine, words("a", "b", output=ALL_LAYERS)).dtype == np.dtype("<f4")


def test_what_cannot_join_leaves_nothing_behind(engine: Sentences) -> None:
    stays = words("a", "b")
    engine.join([stays])
    used = engine.used
    with pytest.raises(CharacterError):
        engine.join([words("fine"), words("bad", "")])
    with pytest.raises(ValueError, match="fit"):
        engine.join([words("fine"), words(*["w"] * 70)])
    assert (engine.in_flight, engine.used) == (1, used)
    assert set(until_empty(engine)) == {stays}


def test_what_is_dropped_does_not_come_back(engine: Sentences) -> None:
    gone, stays = words("a", "b", "c"), words("d", "e")
    engine.join([gone, stays])
    engine.drop([gone])
    engine.drop([gone, words("never joined")])
    assert (engine.in_flight, engine.used) == (1, engine.need(2))
    assert set(until_empty(engine)) == {stays}
    engine.drop([stays])  # it has ended


@pytest.mark.parametrize("how", ["reset", "warm_up"])
def test_a_reset_drops_everything(engine: Sentences, how: str) -> None:
    engine.join([words("a", "b", "c"), words("d")])
    engine.advance()
    getattr(engine, how)()
    assert (engine.in_flight, engine.used) == (0, Capacity(0, 0))
    assert list(engine.advance()) == []


def test_what_is_needed_fits_up_to_the_longest_sentence(engine: Sentences) -> None:
    assert engine.capacity.fits(engine.need(1))
    assert not engine.capacity.fits(engine.need(engine.max_steps + 1))
    assert engine.need(0).rows == 0


def test_a_sentence_without_tokens_ends_too(engine: Sentences) -> None:
    empty = words()
    engine.join([empty])
    assert until_empty(engine)[empty].vectors.size == 0


def test_what_is_left_out_waits_for_the_others_and_then_goes_on(engine: Sentences) -> None:
    patient = words("a", "b", "c", "d", deferrable=True)
    expected = alone(engine, patient)
    engine.join([patient])
    if engine.state_codec is not None:  # others compute a whole sentence at once
        assert list(engine.advance(max_steps=1)) == []
    for _ in range(3):
        urgent = words("e", "f")
        engine.join([urgent])
        ended = list[EngineResult[PlainSentence]]()
        while not ended:
            ended += engine.advance(leave_out=True)
        assert [result.sentence for result in ended] == [urgent]
        assert engine.used == engine.need(4)
    found = list[EngineResult[PlainSentence]]()
    while not found:
        found += engine.advance(leave_out=True)  # there is nothing else
    assert np.array_equal(found[0].vectors, expected)


def test_what_is_left_out_can_leave(engine: Sentences) -> None:
    patient, urgent = words("a", "b", "c", deferrable=True), words("d")
    engine.join([patient, urgent])
    engine.advance(leave_out=True)
    engine.drop([patient])
    assert patient not in until_empty(engine)
    assert engine.used == Capacity(0, 0)


def test_self_checks_count_nothing(engine: Sentences) -> None:
    before = engine.stats.steps
    engine.warm_up()
    engine.check()
    assert engine.stats.steps == before
    alone(engine, words("a", "b"))
    assert engine.stats.steps > before


def test_a_state_continues_where_its_sentence_ended(engine: Sentences) -> None:
    codec = engine.state_codec
    if codec is None:
        first = words("a", "b", return_state=True)
        engine.join([first])
        assert until_empty(engine)[first].state is None
        return
    first = words("a", "b", return_state=True)
    engine.join([first])
    state = codec.decode(codec.encode(until_empty(engine)[first].state))
    carried = alone(engine, words("c", state=state))
    assert not np.array_equal(carried, alone(engine, words("c")))
    with pytest.raises(StateError):
        codec.decode(b"none")


def test_the_toys_compute_what_they_say() -> None:
    a, b = token_value("a"), token_value("b")
    assert alone(SumEngine(CAPACITY), words("a", "b"))[:, 0].tolist() == [a, a + b]
    assert alone(WholeEngine(CAPACITY), words("a", "b"))[:, 0].tolist() == pytest.approx([a / (a + b), b / (a + b)])
