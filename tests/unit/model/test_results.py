"""Results by the round, in both ways, against the plain selection of each sentence by itself."""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bilm_model.engine.backend import Memory
from bilm_model.engine.cpu.fastest import fastest_collector
from bilm_model.engine.cpu.fused_results import FusedCollector
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.result_groups import SHARED_BYTES, Vectors, runs_of
from bilm_model.engine.results import Collector, TorchCollector
from bilm_model.engine.transfer import Event, HostTransfers
from bilm_model.engine.types import DataType, OutputSpec, TokenChoice
from bilm_model.scalar_mix import LayerMix, Pooling, Selection
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.slow_transfers import Counting

P, PLACES, ENTRIES = 37, 400, 50
COUNTS = [3, 9, 4, 30, 3, 5]
MIX = LayerMix((0.3, -0.2, 1.0), 1.5)
LAYERS = {"all": "all", "top": "top", "average": "average", "mix": MIX, "normed": LayerMix(MIX.weights, 0.7, True)}
POOLINGS: tuple[Pooling, ...] = ("none", "mean", "max")
FORMATS: dict[DataType, float] = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
WAYS = pytest.mark.parametrize("kind", [TorchCollector, FusedCollector])


def memory_of() -> Memory:
    generator = torch.Generator().manual_seed(3)
    vectors, outputs = (torch.randn(shape, generator=generator) for shape in ((ENTRIES, P), (2, 2, PLACES, P)))
    return Memory(vectors, outputs, h=torch.empty(0), c=torch.empty(0))


def steps_of(counts: list[int], seed: int = 0) -> SentenceSteps:
    chance = np.random.default_rng(seed)
    n_steps = sum(counts)
    return SentenceSteps(np.array(counts), chance.permutation(PLACES)[:n_steps], chance.integers(0, ENTRIES, n_steps))


def layers_of(memory: Memory, steps: SentenceSteps) -> list[torch.Tensor]:
    """Return each sentence's (L, T + 2, D)."""
    vectors = memory.vectors[steps.entries].repeat(1, 2)[None]
    outputs = torch.cat(memory.outputs[:, :, steps.places].unbind(1), dim=-1)
    return list(torch.split(torch.cat([vectors, outputs]), steps.counts.tolist(), dim=1))


def outputs_of(*data_types: DataType) -> list[OutputSpec]:
    selections = [Selection(*each) for each in itertools.product(LAYERS.values(), POOLINGS, (False, True))]  # type: ignore[arg-type]
    return [OutputSpec(selection, data_type) for selection in selections for data_type in data_types]


def numbers(vectors: Vectors, data_type: DataType) -> torch.Tensor:
    found = torch.from_numpy(np.array(vectors))
    return (found.view(torch.bfloat16) if data_type == "bfloat16" else found).float()


@WAYS
@pytest.mark.parametrize("n_weights", [1, 2, 4])
def test_a_mix_of_another_number_of_layers_is_an_error(kind: type[Collector], n_weights: int) -> None:
    collector = kind(memory_of())  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"weights|argument"):
        collector.collect(steps_of([3]), [OutputSpec(Selection(LayerMix((0.0,) * n_weights)))], {})


@WAYS
@pytest.mark.parametrize("data_type", FORMATS)
def test_each_sentence_gets_what_it_asks_for(kind: type[Collector], data_type: DataType) -> None:
    memory, outputs = memory_of(), outputs_of(data_type)
    collector = kind(memory)  # type: ignore[call-arg]
    for first in range(len(outputs)):  # different ones together, and a few of them twice
        asked = [outputs[(first + i // 2) % len(outputs)] for i in range(len(COUNTS))]
        steps = steps_of(COUNTS, seed=first)
        found = collector.collect(steps, asked, {}).vectors()
        for vectors, output, layers in zip(found, asked, layers_of(memory, steps), strict=True):
            expected, bound = output.selection(layers), FORMATS[data_type]
            assert numbers(vectors, data_type).shape == expected.shape
            assert vectors.dtype == np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}[data_type])
            assert torch.allclose(numbers(vectors, data_type), expected, atol=bound, rtol=bound)


@WAYS
def test_bits_do_not_depend_on_company(kind: type[Collector]) -> None:
    memory, outputs = memory_of(), outputs_of(*FORMATS)
    collector = kind(memory)  # type: ignore[call-arg]
    steps = steps_of(COUNTS)
    starts = np.cumsum(steps.counts) - steps.counts
    for output in outputs:
        together = collector.collect(steps, [output] * len(COUNTS), {}).vectors()
        for vectors, count, start in zip(together, COUNTS, starts.tolist(), strict=True):
            its = slice(start, start + count)
            (alone,) = collector.collect(
                SentenceSteps(np.array([count]), steps.places[its], steps.entries[its]), [output], {}
            ).vectors()
            assert np.array_equal(vectors, alone)


@WAYS
def test_what_is_not_a_number_stays_so(kind: type[Collector]) -> None:
    memory, steps = memory_of(), steps_of([5, 5])
    memory.outputs[1, 0, steps.places[2]] = torch.nan
    for pooling in POOLINGS:
        output = OutputSpec(Selection("top", pooling))
        bad, good = kind(memory).collect(steps, [output] * 2, {}).vectors()  # type: ignore[call-arg]
        assert np.isnan(bad).any()
        assert not np.isnan(good).any()


@WAYS
@pytest.mark.parametrize("data_type", FORMATS)
def test_numbers_are_rounded_to_the_nearest_even_one(kind: type[Collector], data_type: DataType) -> None:
    memory, steps = memory_of(), steps_of([40])
    bits = np.random.default_rng(0).integers(0, 2**32, (40, 2 * P), dtype=np.uint32)
    bits[1] = bits[1] & 0x807FFFFF | 0x38000000  # around the least normal float16, and ties
    bits[2] = bits[2] & 0x8000F000 | 0x3F800000
    whole = torch.from_numpy(bits.view(np.float32).copy())
    whole[3, :8] = torch.tensor([65519.9, 65520.0, -65504.0, 1e30, torch.inf, 2**-24, 2**-25, 5.9604645e-8])
    whole[whole.isnan()] = torch.nan
    memory.outputs[1, 0, steps.places], memory.outputs[1, 1, steps.places] = torch.split(whole, P, dim=1)
    output = OutputSpec(Selection("top"), data_type)
    (vectors,) = kind(memory).collect(steps, [output], {}).vectors()  # type: ignore[call-arg]
    expected = whole[1:-1].to(
        {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[data_type]
    )
    assert torch.equal(numbers(vectors, data_type).nan_to_num(7.0), expected.float().nan_to_num(7.0))


@WAYS
@pytest.mark.parametrize("data_type", FORMATS)
def test_a_result_that_is_kept_keeps_little_beside_itself(kind: type[Collector], data_type: DataType) -> None:
    memory = memory_of()
    asked = [OutputSpec(Selection("top", "mean"), data_type), OutputSpec(Selection(), data_type)] * 3
    for vectors in kind(memory).collect(steps_of(COUNTS), asked, {}).vectors():  # type: ignore[call-arg]
        base = vectors
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert base.nbytes <= vectors.nbytes or base.nbytes <= SHARED_BYTES


class CountingTransfers(HostTransfers):
    """Counts what is sent and what is fetched."""

    def __init__(self) -> None:
        self.n_sent = self.n_fetched = 0

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        self.n_sent += 1
        return super().send(source, target)

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        self.n_fetched += 1
        return super().fetch(source, target)


def operators_of(
    n_sentences: int, asked: Sequence[OutputSpec], choices: Sequence[TokenChoice | None] = (None,)
) -> Counter[str]:
    """Return the operators of a round, for sentences of four tokens with these outputs and choices in turns."""
    memory = Memory(torch.randn(ENTRIES, P), torch.randn(2, 2, 1200, P), h=torch.empty(0), c=torch.empty(0))
    steps = SentenceSteps(np.full(n_sentences, 6), np.arange(6 * n_sentences), np.arange(6 * n_sentences) % ENTRIES)
    transfers = CountingTransfers()
    collector = TorchCollector(memory, transfers)
    outputs = list(itertools.islice(itertools.cycle(asked), n_sentences))
    chosen = {number: each for number, each in zip(range(n_sentences), itertools.cycle(choices), strict=False) if each}
    with Counting() as counting:
        collected = collector.collect(steps, outputs, chosen)
    assert (transfers.n_sent, transfers.n_fetched) == (1, 1)
    with Counting() as reading:
        assert len(collected.vectors()) == n_sentences
    assert not reading.operators
    operators: Counter[str] = counting.operators
    return operators


N_COPIES = {"all": 1, "top": 0, "average": 1, "mix": 1, "normed": 1}
"""Of vectors, for each selection: those of the token layer to both directions."""


@pytest.mark.parametrize("data_type", FORMATS)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layers", LAYERS)
def test_operators_and_copies_do_not_grow_with_sentences(
    layers: str, pooling: Pooling, unit: bool, data_type: DataType
) -> None:
    output = OutputSpec(Selection(LAYERS[layers], pooling, unit), data_type)  # type: ignore[arg-type]
    few, many = operators_of(2, [output]), operators_of(200, [output])
    assert few == many
    copies = Counter({name: n for name, n in few.items() if "copy" in name})
    # One to the device, one back, and one that writes and converts what isn't in memory already
    is_plain = layers in {"all", "top"} and pooling == "none" and not unit and data_type == "float32"
    assert copies == {"aten.copy_.default": 2 + N_COPIES[layers] + (not is_plain)}
    assert "aten._local_scalar_dense.default" not in few  # a number that the host asks for
    choices = [rows_of(3, 3, 0), None, *([spans_of([0, 1], [2]), spans_of([3])] if pooling != "none" else [])]
    assert operators_of(200, [output], choices) == many


def test_operators_do_not_grow_with_different_mixes() -> None:
    chance = np.random.default_rng(0)
    mixes = [LayerMix(tuple(chance.normal(size=3).tolist()), float(i)) for i in range(200)]
    asked = [OutputSpec(Selection(mix)) for mix in mixes]
    assert operators_of(200, asked) == operators_of(2, asked)


# ---- chosen tokens ----


def rows_of(*rows: int) -> TokenChoice:
    return TokenChoice(np.array(rows))


def spans_of(*spans: Sequence[int]) -> TokenChoice:
    return TokenChoice(np.array(list(itertools.chain.from_iterable(spans))), np.array(list(map(len, spans))))


def random_rows(chance: np.random.Generator, n_tokens: int) -> list[int]:
    found: list[int] = chance.integers(0, n_tokens, chance.integers(1, 2 * n_tokens + 1)).tolist()
    return found


@WAYS
def test_chosen_rows_are_those_of_the_whole_sentence(kind: type[Collector]) -> None:
    memory, chance = memory_of(), np.random.default_rng(1)
    collector, steps = kind(memory), steps_of(COUNTS)  # type: ignore[call-arg]
    for output in outputs_of(*FORMATS):
        whole = collector.collect(steps, [output] * len(COUNTS), {}).vectors()
        rows = {number: random_rows(chance, COUNTS[number] - 2) for number in (0, 1, 3, 5)}
        choices = {number: rows_of(*its) for number, its in rows.items()}
        found = collector.collect(steps, [output] * len(COUNTS), choices).vectors()
        for number, vectors in enumerate(found):
            if number not in rows:
                assert np.array_equal(vectors, whole[number])
            elif not output.pooled:
                assert np.array_equal(vectors, whole[number][..., rows[number], :])


@WAYS
def test_all_rows_in_their_order_are_pooled_as_without_a_choice(kind: type[Collector]) -> None:
    memory = memory_of()
    collector, steps = kind(memory), steps_of(COUNTS)  # type: ignore[call-arg]
    choices = {number: rows_of(*range(count - 2)) for number, count in enumerate(COUNTS)}
    for output in outputs_of(*FORMATS):
        whole = collector.collect(steps, [output] * len(COUNTS), {}).vectors()
        found = collector.collect(steps, [output] * len(COUNTS), choices).vectors()
        assert all(map(np.array_equal, found, whole))


@WAYS
def test_chosen_rows_are_pooled_in_the_order_in_which_they_are_given(kind: type[Collector]) -> None:
    memory, chance = memory_of(), np.random.default_rng(2)
    collector, steps = kind(memory), steps_of(COUNTS)  # type: ignore[call-arg]
    for layers in LAYERS.values():
        plain = OutputSpec(Selection(layers))  # type: ignore[arg-type]
        whole = collector.collect(steps, [plain] * len(COUNTS), {}).vectors()
        rows = [random_rows(chance, count - 2) for count in COUNTS]
        choices = {number: rows_of(*its) for number, its in enumerate(rows)}
        mean, highest = (OutputSpec(Selection(layers, pooling)) for pooling in ("mean", "max"))  # type: ignore[arg-type]
        means = collector.collect(steps, [mean] * len(COUNTS), choices).vectors()
        maxima = collector.collect(steps, [highest] * len(COUNTS), choices).vectors()
        for number, its in enumerate(rows):
            taken = [numbers(whole[number], "float32").numpy()[..., row, :] for row in its]
            assert np.array_equal(means[number], functools.reduce(np.add, taken) / np.float32(len(its)))
            assert np.array_equal(maxima[number], functools.reduce(np.maximum, taken))


@WAYS
def test_each_span_is_pooled_by_itself(kind: type[Collector]) -> None:
    memory, chance = memory_of(), np.random.default_rng(3)
    collector, steps = kind(memory), steps_of(COUNTS)  # type: ignore[call-arg]
    spans = {number: [random_rows(chance, COUNTS[number] - 2) for _ in range(1 + number)] for number in (1, 2, 5)}
    for output in outputs_of(*FORMATS):
        if not output.pooled:
            continue
        asked = [output] * len(COUNTS)
        found = collector.collect(steps, asked, {i: spans_of(*its) for i, its in spans.items()}).vectors()
        assert np.array_equal(found[0], collector.collect(steps, asked, {}).vectors()[0])
        for number, its in spans.items():
            assert found[number].shape == (*found[0].shape[:-1], len(its), 2 * P)
            for i, rows in enumerate(its):
                alone = collector.collect(steps, asked, {number: rows_of(*rows)}).vectors()[number]
                assert np.array_equal(found[number][..., i, :], alone)


@WAYS
def test_more_chosen_rows_than_the_memory_has_places(kind: type[Collector]) -> None:
    memory, chance = memory_of(), np.random.default_rng(4)
    collector, steps = kind(memory), steps_of(COUNTS)  # type: ignore[call-arg]
    many = chance.integers(0, 2, 3 * PLACES).tolist()
    for output in outputs_of("float32"):
        asked = [output] * len(COUNTS)
        choices = {1: rows_of(0, 2), 2: rows_of(*many), 3: rows_of(*many), 4: rows_of(0)}
        if output.pooled:
            choices[3] = spans_of(many[:PLACES], many[PLACES:])
        found = collector.collect(steps, asked, choices).vectors()
        for number, vectors in enumerate(found):
            its = {number: choices[number]} if number in choices else {}
            assert np.array_equal(vectors, collector.collect(steps, asked, its).vectors()[number])


def test_runs_have_no_more_rows_than_they_may() -> None:
    steps, choices = steps_of([5, 4, 12, 3, 3, 3]), {3: rows_of(*[0] * 9), 4: rows_of(0)}
    assert [list(run) for run in runs_of(steps, choices, 10)] == [[0, 1], [2], [3, 4], [5]]
    assert runs_of(steps, choices, 100) == [range(6)]
    assert runs_of(steps, {0: rows_of(*[1] * 50)}, 20) == [range(1), range(1, 6)]


def test_memory_is_bounded_by_the_places() -> None:
    """Of what is read at a time, whatever is chosen."""
    memory, steps = memory_of(), steps_of([4] * 20)
    asked = [OutputSpec(Selection("all", "mean"))] * 20
    choices = {number: rows_of(*[0] * PLACES) for number in range(20)}
    with Largest() as largest:
        TorchCollector(memory).collect(steps, asked, choices).vectors()
    assert largest.n_numbers <= 3 * PLACES * 2 * P


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Notes the size of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # likewise
        self.n_numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype.is_floating_point:
            self.n_numbers = max(self.n_numbers, found.numel())
        return found


@WAYS
def test_each_sentence_has_its_own_mix(kind: type[Collector]) -> None:
    memory, steps = memory_of(), steps_of(COUNTS)
    for normed in (False, True):
        mixes = [LayerMix((0.1 * i, -0.2, 0.3 * i), 1.0 + i, normed) for i in range(len(COUNTS))]
        found = kind(memory).collect(steps, [OutputSpec(Selection(mix)) for mix in mixes], {}).vectors()  # type: ignore[call-arg]
        for vectors, mix, layers in zip(found, mixes, layers_of(memory, steps), strict=True):
            assert np.allclose(vectors, Selection(mix)(layers), atol=1e-5)


def test_the_kernel_is_used_where_it_works() -> None:
    assert isinstance(fastest_collector(memory_of()), FusedCollector)
