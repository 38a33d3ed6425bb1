"""Rounds of the engine as on a GPU, on CPU tensors: captures, transfers, operators, and when results are waited for."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.backend import Memory
from bilm_model.engine.backends import MAX_TICKS
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cuda.backend import CudaBackend
from bilm_model.engine.cuda.graphs import Capture, Captures, Graph, captured
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.results import TorchCollector
from bilm_model.engine.sentences import PlainSentence
from bilm_model.engine.state import LstmState, LstmStateCodec
from bilm_model.engine.transfer import Transfers
from bilm_model.engine.types import EngineResult, OutputSpec
from bilm_model.scalar_mix import LayerMix, Selection

from tests.support.slow_transfers import Counting, SlowFetches

CPU = torch.device("cpu")
CONFIG = replace(SIZES["tiny"], n_layers=2)
Engine = RecurrentEngine[PlainSentence]


def batch_of(max_rows: int = 256, captures: Captures | None = None) -> CellularBatch:
    def new_backend(bilm: Bilm, memory: Memory, options: EngineOptions) -> CudaBackend:
        assert options.max_rows is not None
        return CudaBackend(bilm, memory, options.max_rows, MAX_TICKS, captures=captures)

    torch.manual_seed(5)
    options = EngineOptions(max_rows=max_rows, max_tokens=4096, input_cache_mib=0)
    return CellularBatch(random_bilm(CONFIG), CPU, options, new_backend)


def engine_of(transfers: Transfers | None = None) -> Engine:
    batch = batch_of()
    return RecurrentEngine(batch, LstmStateCodec(CONFIG, "0" * 16), TorchCollector(batch.memory, transfers))


def state_of(seed: int) -> LstmState:
    chance = np.random.default_rng(seed)
    shapes = ((CONFIG.n_layers, 2, size) for size in (CONFIG.projection_dim, CONFIG.cell_dim))
    h, c = (chance.uniform(-0.9, 0.9, shape).astype(np.float32) for shape in shapes)
    return h, c


def until_empty(engine: Engine) -> dict[PlainSentence, EngineResult[PlainSentence]]:
    found: dict[PlainSentence, EngineResult[PlainSentence]] = {}
    for _ in range(1000):
        if not engine.in_flight:
            return found
        found.update({result.sentence: result for result in engine.advance()})
    raise AssertionError("sentences stay in flight")


# ---- captures -------------------------------------------------------------------------------------------------------


class Replayed:
    """A graph that does its work again, and counts how often."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self.n_replays = work, 0

    def replay(self) -> None:
        self.n_replays += 1
        self._work()


class FakeCaptures:
    """Captures of a device that has no graphs, one of which may fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.graphs: list[Replayed] = []
        self.fails_at, self.n_contexts = fails_at, 0

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[Capture]:
        assert device == CPU
        self.n_contexts += 1
        yield self._capture
        self.n_contexts -= 1

    def _capture(self, work: Callable[[], None]) -> Graph:
        if len(self.graphs) == self.fails_at:
            raise RuntimeError("capture failed")
        self.graphs.append(Replayed(work))
        return self.graphs[-1]


def test_graphs_are_replayed_once_before_anything_is_served() -> None:
    captures = FakeCaptures()
    batch, plain = batch_of(4, captures), batch_of(4)
    batch.memory.h.fill_(torch.nan)  # whatever a replay leaves there is no sentence's
    batch.memory.c.fill_(torch.nan)
    backend = batch._backend
    backend.prepare()
    assert captures.n_contexts == 0
    assert len(captures.graphs) == 3 * 3 * CONFIG.n_layers  # 1, 2 and 4 rows; 1, 4 and 16 ticks
    assert {graph.n_replays for graph in captures.graphs} == {1}
    assert backend.paths["recurrence"] == "graphs"
    backend.prepare()  # again, as when the engine warms up after a failure
    assert len(captures.graphs) == 3 * 3 * CONFIG.n_layers

    sentences = [PlainSentence(["a", "b", "c"][: 1 + i % 3] * 9, state_of(i) if i % 2 else None) for i in range(9)]
    for found, expected in zip(batch.run(sentences), plain.run(sentences), strict=True):
        assert torch.equal(found.layers, expected.layers)
        assert torch.equal(found.c, expected.c)
    assert sum(graph.n_replays for graph in captures.graphs) > len(captures.graphs)


def test_a_capture_that_fails_leaves_no_graphs() -> None:
    captures = FakeCaptures(fails_at=5)
    batch = batch_of(4, captures)
    backend = batch._backend
    with pytest.raises(RuntimeError, match="capture failed"):
        backend.prepare()
    assert backend.paths["recurrence"] == "ticks"
    assert torch.isfinite(batch.run([PlainSentence(["a", "b"])])[0].layers).all()
    captures.fails_at = None
    backend.prepare()
    assert backend.paths["recurrence"] == "graphs"


class FakeGraph:
    """`torch.cuda.CUDAGraph`, which notes what it is asked for."""

    def __init__(self, *, end_fails: bool) -> None:
        self.calls: list[str] = []
        self._end_fails = end_fails

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.calls.append(f"begin {pool} {capture_error_mode}")

    def capture_end(self) -> None:
        self.calls.append("end")
        if self._end_fails:
            raise RuntimeError("the capture is invalid")


@pytest.mark.parametrize("end_fails", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), KeyboardInterrupt("no such kernel")])
def test_a_capture_ends_whatever_its_work_raises(error: BaseException, end_fails: bool) -> None:
    graph = FakeGraph(end_fails=end_fails)

    def work() -> None:
        graph.calls.append("work")
        raise error

    with pytest.raises(type(error), match="no such kernel"):
        captured(work, "pool", lambda: graph)
    assert graph.calls == ["begin pool thread_local", "work", "end"]


def test_a_capture_whose_end_fails_is_no_graph() -> None:
    with pytest.raises(RuntimeError, match="the capture is invalid"):
        captured(lambda: None, "pool", lambda: FakeGraph(end_fails=True))
    graph = FakeGraph(end_fails=False)
    found: object = captured(lambda: graph.calls.append("work"), "pool", lambda: graph)
    assert found is graph
    assert graph.calls == ["begin pool thread_local", "work", "end"]


# ---- what a round asks the device for -------------------------------------------------------------------------------

MIX = LayerMix((0.1, 0.2, 0.3), 1.0, True)
OUTPUTS = [OutputSpec(Selection()), OutputSpec(Selection("top", "mean"), "float16"), OutputSpec(Selection(MIX, "max"))]


def operators_of(n_sentences: int, outputs: Sequence[OutputSpec], *, with_states: bool) -> Counter[str]:
    """Return all operators from joining to the results, for sentences that are in one round."""
    engine = engine_of()
    asked = itertools.cycle(outputs)
    sentences = [
        PlainSentence(
            ("the", "same", "words", "."),
            state_of(i) if with_states else None,
            next(asked),
            return_state=with_states,
        )
        for i in range(n_sentences)
    ]
    for _ in range(4):  # until words are in the table, and pages have grown
        counting = Counting()
        with counting:
            engine.join(sentences)
            assert len(engine.advance()) == n_sentences
    operators: Counter[str] = counting.operators
    return operators


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("outputs", [OUTPUTS[:1], OUTPUTS[1:2], OUTPUTS], ids=["all", "mean of top", "three kinds"])
def test_operators_of_a_round_do_not_grow_with_sentences(outputs: list[OutputSpec], with_states: bool) -> None:
    few = operators_of(len(outputs) + 1, outputs, with_states=with_states)
    assert few == operators_of(200, outputs, with_states=with_states)
    assert not [name for name in few if "_local_scalar_dense" in name or "nonzero" in name]


@pytest.mark.parametrize("data_type", ["float32", "float16", "bfloat16"])
def test_a_sentence_without_tokens_asks_a_device_for_nothing(data_type: str) -> None:
    engine = engine_of()
    selections = [Selection(), Selection("top", "none", True), Selection("average"), Selection(MIX)]
    sentences = [
        PlainSentence([], state_of(1), OutputSpec(each, data_type), return_state=True)  # type: ignore[arg-type]
        for each in selections
    ]
    with Counting() as counting:
        engine.join(sentences)
        results = engine.advance()
    assert not counting.operators
    for sentence, result in zip(sentences, results, strict=True):
        expected = sentence.output.selection(torch.zeros(CONFIG.layer_count, 0, CONFIG.width))
        assert result.vectors.shape == expected.shape
        assert result.state is not None
        assert all(np.array_equal(a, b) for a, b in zip(result.state, state_of(1), strict=True))


def test_states_come_back_to_their_own_sentences() -> None:
    engine, batch = engine_of(), batch_of()
    sentences = [
        PlainSentence(["a"] * (1 + i % 4), state_of(i) if i % 2 else None, return_state=i % 3 > 0) for i in range(40)
    ]
    engine.join(sentences)
    results = until_empty(engine)
    for sentence, expected in zip(sentences, batch.run(sentences), strict=True):
        state = results[sentence].state
        assert (state is not None) == sentence.return_state
        if state is not None:
            assert all(np.array_equal(a, b) for a, b in zip(state, (expected.h, expected.c), strict=True))
            assert all(part.base is None for part in state)  # it keeps nothing else


# ---- when results are waited for ------------------------------------------------------------------------------------


def end_all(transfers: SlowFetches) -> None:
    while transfers.copies:
        transfers.next_copy()


def test_results_are_waited_for_only_when_nothing_else_is_to_be_computed() -> None:
    transfers = SlowFetches()
    engine, alone = engine_of(transfers), engine_of()
    short, long = PlainSentence(["a"]), PlainSentence(["b"] * 200)
    engine.join([short, long])
    for _ in range(3):
        assert engine.advance() == []  # the short one has ended, and is on its way
    assert transfers.n_slept == 0
    assert engine.in_flight == 2
    end_all(transfers)
    (found,) = engine.advance()
    assert found.sentence is short
    assert transfers.n_slept == 0
    found_long = until_empty(engine)[long]
    assert transfers.n_slept == 1
    alone.join([short, long])
    expected = until_empty(alone)
    assert np.array_equal(found.vectors, expected[short].vectors)
    assert np.array_equal(found_long.vectors, expected[long].vectors)


def test_results_on_their_way_can_be_dropped() -> None:
    transfers = SlowFetches()
    engine = engine_of(transfers)
    sentences = [PlainSentence(["a"] * n, return_state=True) for n in (2, 2, 200)]
    engine.join(sentences)
    engine.advance()
    engine.drop(sentences[:1])
    end_all(transfers)
    assert [result.sentence for result in engine.advance()] == sentences[1:2]
    engine.join([PlainSentence(["c"])])
    engine.advance()
    engine.reset()
    assert engine.in_flight == 0
    last = PlainSentence(["d"])
    engine.join([last])
    assert list(until_empty(engine)) == [last]
