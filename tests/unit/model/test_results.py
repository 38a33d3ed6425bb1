"""Results by the round, in both ways, against the plain selection of each sentence by itself."""

import itertools

import numpy as np
import pytest
import torch
from bilm_model.engine.backend import Memory
from bilm_model.engine.cpu.fastest import fastest_collector
from bilm_model.engine.cpu.fused_results import FusedCollector
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.results import SHARED_BYTES, Collector, TorchCollector, Vectors
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import LayerMix, Pooling, Selection
from torch.overrides import TorchFunctionMode

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
        collector.collect(steps_of([3]), [OutputSpec(Selection(LayerMix((0.0,) * n_weights)))])


@WAYS
@pytest.mark.parametrize("data_type", FORMATS)
def test_each_sentence_gets_what_it_asks_for(kind: type[Collector], data_type: DataType) -> None:
    memory, outputs = memory_of(), outputs_of(data_type)
    collector = kind(memory)  # type: ignore[call-arg]
    for first in range(len(outputs)):  # different ones together, and a few of them twice
        asked = [outputs[(first + i // 2) % len(outputs)] for i in range(len(COUNTS))]
        steps = steps_of(COUNTS, seed=first)
        found = collector.collect(steps, asked).vectors()
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
        together = collector.collect(steps, [output] * len(COUNTS)).vectors()
        for vectors, count, start in zip(together, COUNTS, starts.tolist(), strict=True):
            its = slice(start, start + count)
            (alone,) = collector.collect(
                SentenceSteps(np.array([count]), steps.places[its], steps.entries[its]), [output]
            ).vectors()
            assert np.array_equal(vectors, alone)


@WAYS
def test_what_is_not_a_number_stays_so(kind: type[Collector]) -> None:
    memory, steps = memory_of(), steps_of([5, 5])
    memory.outputs[1, 0, steps.places[2]] = torch.nan
    for pooling in POOLINGS:
        output = OutputSpec(Selection("top", pooling))
        bad, good = kind(memory).collect(steps, [output] * 2).vectors()  # type: ignore[call-arg]
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
    (vectors,) = kind(memory).collect(steps, [output]).vectors()  # type: ignore[call-arg]
    expected = whole[1:-1].to(
        {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[data_type]
    )
    assert torch.equal(numbers(vectors, data_type).nan_to_num(7.0), expected.float().nan_to_num(7.0))


@WAYS
@pytest.mark.parametrize("data_type", FORMATS)
def test_a_result_that_is_kept_keeps_little_beside_itself(kind: type[Collector], data_type: DataType) -> None:
    memory = memory_of()
    asked = [OutputSpec(Selection("top", "mean"), data_type), OutputSpec(Selection(), data_type)] * 3
    for vectors in kind(memory).collect(steps_of(COUNTS), asked).vectors():  # type: ignore[call-arg]
        base = vectors
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert base.nbytes <= vectors.nbytes or base.nbytes <= 4 * SHARED_BYTES


class Counting(TorchFunctionMode):
    """Counts operators and tensors' methods."""

    n_calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.n_calls += 1
        return func(*args, **(kwargs or {}))


@WAYS
@pytest.mark.parametrize("output", outputs_of("float16"), ids=str)
def test_operators_do_not_grow_with_sentences(kind: type[Collector], output: OutputSpec) -> None:
    collector, counted = kind(memory_of()), []  # type: ignore[call-arg]
    for n_sentences in (2, 20):
        with Counting() as counting:
            collector.collect(steps_of([5] * n_sentences), [output] * n_sentences)
        counted.append(counting.n_calls)
    assert counted[0] == counted[1]


def test_the_kernel_is_used_where_it_works() -> None:
    assert isinstance(fastest_collector(memory_of()), FusedCollector)
