"""Results of a round in one kernel on a CPU: gathered, mixed, normalised and pooled, each sentence by itself.

Legend: L layers with the token layer, N steps of all sentences, T tokens, D width, P projection.
"""

import functools
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numba import carray
from numpy.typing import NDArray

from bilm_model.engine.backend import Memory
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.result_groups import (
    NUMPY_TYPES,
    SHARED_BYTES,
    Choices,
    Vectors,
    grouped,
    shape_of,
    shares_of,
)
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.kernels.numba_blocks import (
    Kernel,
    bfloat16s,
    copy_block,
    float32s,
    half_bits,
    inner,
    int64s,
    kernel,
    openmp,
    run,
    share,
    shifted,
    store,
)
from bilm_model.scalar_mix import LAYER_NORM_EPSILON, LayerMix

_MIN_PARALLEL = 2**20
"""Numbers that are read from which on all threads make results: OpenMP's threads spin afterwards, and would keep the
cells' helper from its core."""
_LEAST_NORM = np.float32(1e-12)
"""As in `torch.nn.functional.normalize`."""
_EPSILON = np.float32(LAYER_NORM_EPSILON)
_POOLINGS = {"none": 0, "mean": 1, "max": 2}
_KINDS: dict[DataType, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
_JOB = 12
"""Numbers that describe a sentence to the kernel."""
_KEPT_WISHES = 64
"""Different outputs that are remembered."""


@inner
def _half(memory, layer, direction, step):  # type: ignore[no-untyped-def]
    """Return a pointer to a direction's vector (P) of a step; `memory` as `_collect` is given it."""
    n_components, _, n_places, vectors, outputs, places, entries, _ = memory
    if layer == 0:
        return float32s(vectors + int64s(entries)[step] * n_components * 4)
    row = ((layer - 1) * 2 + direction) * n_places + int64s(places)[step]
    return float32s(outputs + row * n_components * 4)


@inner
def _statistics(memory, layer, first, n_steps, sums):  # type: ignore[no-untyped-def]
    """Return mean and 1 / deviation of a sentence's layer, boundaries included, in two passes; sums (P) is scratch."""
    n_components = memory[0]
    mean, squares = 0.0, 0.0
    for second in range(2):
        for k in range(n_components):
            sums[k] = np.float32(0.0)
        centre = np.float32(mean)
        for step in range(first, first + n_steps):
            for direction in range(2):
                half = _half(memory, layer, direction, step)
                for k in range(n_components):
                    part = half[k] - centre
                    sums[k] = sums[k] + (part * part if second else part)
        total = 0.0
        for k in range(n_components):
            total += sums[k]
        total /= n_steps * 2 * n_components
        mean, squares = (mean, total) if second else (total, squares)
    return np.float32(mean), np.float32(1.0) / np.sqrt(np.float32(squares) + _EPSILON)


@inner
def _mix_row(memory, step, weights, offset, row):  # type: ignore[no-untyped-def]
    """Row (D) = offset + Σ weights[layer] · the layer's vector."""
    n_components, n_layers = memory[0], memory[1]
    for k in range(2 * n_components):
        row[k] = offset
    for layer in range(n_layers):
        for direction in range(2):
            half, part, weight = _half(memory, layer, direction, step), direction * n_components, weights[layer]
            for k in range(n_components):
                row[part + k] = row[part + k] + weight * half[k]


@inner
def _pool(pooling, n_before, n, row, pooled):  # type: ignore[no-untyped-def]
    """Take n numbers of a row into the sum or maximum of those of the rows before it; without pooling, copy them."""
    if pooling == 0 or n_before == 0:
        copy_block(n, row, pooled)
    elif pooling == 1:
        for k in range(n):
            pooled[k] = pooled[k] + row[k]
    else:
        for k in range(n):
            # NaN stays NaN
            pooled[k] = row[k] if row[k] > pooled[k] or row[k] != row[k] else pooled[k]


@inner
def _pool_layer(memory, layer, step, pooling, n_before, pooled):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Take a layer's vector (D) of a step in, as `_pool` does."""
    for direction in range(2):
        half = _half(memory, layer, direction, step)
        _pool(pooling, n_before, memory[0], half, shifted(pooled, direction * memory[0]))


@inner
def _end_pooling(pooling, count, n, pooled):  # type: ignore[no-untyped-def]
    if pooling == 1:
        for k in range(n):
            pooled[k] = pooled[k] / np.float32(count)


@inner
def _normalise(width, row):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for k in range(width):
        total += row[k] * row[k]
    norm = np.sqrt(total)
    norm = _LEAST_NORM if norm < _LEAST_NORM else norm
    for k in range(width):
        row[k] = row[k] / norm


@inner
def _mix_of(memory, first, n_steps, mix, normed, scratch):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Write what each layer is multiplied by behind a row of scratch, and return what is added, for normed layers."""
    offset, weights = np.float32(0.0), shifted(scratch, 2 * memory[0])
    for layer in range(memory[1]):
        weights[layer] = float32s(mix)[layer]
        if normed:
            mean, scale = _statistics(memory, layer, first, n_steps, scratch)
            weights[layer] = weights[layer] * scale
            offset -= weights[layer] * mean
    return offset


@inner
def _write(width, row, kind, out):  # type: ignore[no-untyped-def]
    """Write a row as float32, float16 or bfloat16 (kinds 0, 1, 2)."""
    if kind == 0:
        copy_block(width, row, float32s(out))
    elif kind == 1:
        target = bfloat16s(out)  # 16 bits each
        for k in range(width):
            target[k] = np.uint16(half_bits(row[k]))
    else:
        for k in range(width):
            store(bfloat16s(out), k, row[k])


@inner
def _collect(memory, job, scratch):  # type: ignore[no-untyped-def]
    """Make one sentence's result.

    Args:
        memory: P, L, A and the addresses of vectors, outputs, places and entries; the last number is of no use here.
        job: first step, steps, ranges of rows, address of the steps at which they begin (and the last one ends) or 0,
            first layer, layers that are returned, address of the mix's weights (L) or 0, whether layers are normalised
            first, pooling, whether vectors are, kind of the numbers, and where the result goes. Without such an
            address the tokens are the only range; each is pooled by itself.
        scratch: (2·D + L) of this sentence: a row, the weights, what is pooled.
    """
    width = 2 * memory[0]
    first, n_steps, n_ranges, bounds, first_layer, n_layers, mix, normed, pooling, unit, kind, out = carray(job, _JOB)
    weights, offset = shifted(scratch, width), np.float32(0.0)
    pooled, row_bytes = shifted(weights, memory[1]), width * (2 if kind else 4)
    if mix != 0:
        offset = _mix_of(memory, first, n_steps, mix, normed != 0, scratch)
    begin, end = first + 1, first + n_steps - 1  # without the boundaries
    for layer in range(first_layer, first_layer + n_layers):
        for number in range(n_ranges):
            if bounds != 0:
                begin, end = int64s(bounds)[number], int64s(bounds)[number + 1]
            for step in range(begin, end):
                target = pooled if pooling else scratch
                if mix == 0:
                    _pool_layer(memory, layer, step, pooling, step - begin, target)
                else:
                    _mix_row(memory, step, weights, offset, scratch)
                    if pooling:
                        _pool(pooling, step - begin, width, scratch, pooled)
                if not pooling:
                    if unit:
                        _normalise(width, scratch)
                    _write(width, scratch, kind, out)
                    out += row_bytes
            if pooling:
                _end_pooling(pooling, end - begin, width, pooled)
                if unit:
                    _normalise(width, pooled)
                _write(width, pooled, kind, out)
                out += row_bytes


def _collect_all(arguments):  # type: ignore[no-untyped-def]
    n_threads, n_jobs, jobs, scratch = carray(arguments, 4)
    memory = carray(arguments, 12)[4:]
    begin, end = share(n_jobs, n_threads)
    n_scratch = 4 * memory[0] + memory[1]
    for number in range(begin, end):
        _collect(memory, int64s(jobs + number * _JOB * 8), float32s(scratch + number * n_scratch * 4))


@functools.cache
def _kernel() -> Kernel:
    """Return the kernel, once a process: what is loaded stays loaded."""
    return kernel(_collect_all)


@dataclass(frozen=True, eq=False)
class _Wish:
    """An output as the kernel reads it.

    Attributes:
        numbers: Of a job, from the ranges of a sentence all of whose tokens come back to the kind of the numbers.
        weights: (L,) float32 at that address, if layers are mixed.
    """

    numbers: tuple[int, ...]
    weights: NDArray[np.float32] | None


@functools.lru_cache(_KEPT_WISHES)
def _wish(output: OutputSpec, n_layers: int) -> _Wish:
    """Return how the kernel reads an output; most rounds ask for what the one before asked for.

    Raises:
        ValueError: If a mix has another number of weights than there are layers.
    """
    selection = output.selection
    weights = shares_of(selection, n_layers)
    normed = isinstance(selection.layers, LayerMix) and selection.layers.layer_norm
    first = n_layers - 1 if selection.layers == "top" else 0
    count = n_layers if selection.layers == "all" else 1
    flags = (int(normed), _POOLINGS[selection.pooling], int(selection.l2_normalize), _KINDS[output.data_type])
    return _Wish((1, 0, first, count, 0 if weights is None else weights.ctypes.data, *flags), weights)


@dataclass(eq=False, slots=True)
class FusedCollected:
    """`Collected`, on the host already.

    Attributes:
        found: Each sentence's vectors.
    """

    found: list[Vectors]

    def done(self) -> bool:
        """Return True."""
        return True

    def vectors(self) -> list[Vectors]:
        """See `Collected`."""
        return self.found


class FusedCollector:
    """`Collector` in one kernel, on a CPU."""

    path = "fused"

    def __init__(self, memory: Memory) -> None:
        """Compile the kernel, or take it from the cache.

        Raises:
            Exception: Whatever keeps it from being compiled.
        """
        self._kernel, self._parallel = _kernel(), openmp()
        self._n_layers, self._width = len(memory.outputs) + 1, 2 * memory.vectors.shape[1]
        addresses = [tensor.data_ptr() for tensor in (memory.vectors, memory.outputs)]
        self._memory = memory
        self._numbers = (memory.vectors.shape[1], self._n_layers, memory.outputs.shape[2], *addresses)
        self._n_scratch = 2 * self._width + self._n_layers
        self._grow_scratch(1)

    def collect(self, steps: SentenceSteps, outputs: Sequence[OutputSpec], choices: Choices) -> FusedCollected:
        """See `Collector`."""
        counts = steps.counts.tolist()
        jobs: list[Sequence[int]] = [()] * len(counts)
        found: list[Vectors] = [_NONE] * len(counts)
        wishes: list[_Wish] = []
        firsts = list(itertools.accumulate(counts, initial=0))
        steps, ranges, bounds = _with_choices(steps, choices) if choices else (steps, {}, _NONE)
        for output, numbers in grouped(outputs):
            wish = _wish(output, self._n_layers)
            wishes.append(wish)  # the kernel reads what it holds
            if output.pooled and not choices:
                memory = self._pooled(output, len(numbers))
            else:
                memory = self._apart(output, numbers, counts, choices)
            for number, (vectors, address) in zip(numbers, memory, strict=True):
                found[number], jobs[number] = vectors, (firsts[number], counts[number], *wish.numbers, address)
        for number, its in ranges.items():
            first, n_steps, _, _, *others = jobs[number]
            jobs[number] = (first, n_steps, *its, *others)
        self._run(steps, array("q", itertools.chain.from_iterable(jobs)))
        del bounds  # the kernel has read them
        return FusedCollected(found)

    def _pooled(self, output: OutputSpec, n_sentences: int) -> Iterator[tuple[Vectors, int]]:
        """Yield memory for each pooled result, which share some, and its address."""
        shape = shape_of(0, self._n_layers, self._width, output)
        dtype = np.dtype(NUMPY_TYPES[output.data_type])
        n_bytes = dtype.itemsize * math.prod(shape)
        n_rows = max(1, SHARED_BYTES // n_bytes)
        for first in range(0, n_sentences, n_rows):
            results = np.empty((min(n_rows, n_sentences - first), *shape), dtype)
            address = results.ctypes.data
            yield from zip(results, range(address, address + results.nbytes, n_bytes), strict=True)

    def _apart(
        self, output: OutputSpec, numbers: Sequence[int], counts: Sequence[int], choices: Choices
    ) -> Iterator[tuple[Vectors, int]]:
        """Yield memory of its own for each result, and its address."""
        for number in numbers:
            shape = shape_of(counts[number] - 2, self._n_layers, self._width, output, choices.get(number))
            vectors = np.empty(shape, NUMPY_TYPES[output.data_type])
            yield vectors, vectors.ctypes.data

    def _run(self, steps: SentenceSteps, jobs: "array[int]") -> None:
        n_jobs = len(jobs) // _JOB
        if n_jobs * self._n_scratch > len(self._scratch):
            self._grow_scratch(n_jobs)
        places, entries = steps.places.ctypes.data, steps.entries.ctypes.data
        n_numbers = len(steps.places) * self._width * self._n_layers
        run(
            self._kernel, n_numbers, n_jobs, jobs.buffer_info()[0], self._scratch_address, *self._numbers, places,
            entries, 0, parallel=self._parallel if n_numbers >= _MIN_PARALLEL else None,
        )  # fmt: skip

    def _grow_scratch(self, n_jobs: int) -> None:
        self._scratch = np.empty(n_jobs * self._n_scratch, dtype=np.float32)
        self._scratch_address = self._scratch.ctypes.data


_NONE = np.empty(0, dtype=np.float32)


def _with_choices(
    steps: SentenceSteps, choices: Choices
) -> tuple[SentenceSteps, dict[int, tuple[int, int]], NDArray[np.int64]]:
    """Append the steps that choices name, once for each time that they are named.

    Returns:
        The steps; by the number of a sentence with a choice its ranges, as `_collect` is given them; and the memory
        that these have.
    """
    tokens = np.cumsum(steps.counts) - steps.counts + 1
    chosen = np.concatenate([tokens[number] + choice.rows for number, choice in choices.items()])
    places, entries = (np.concatenate([each, each[chosen]]) for each in (steps.places, steps.entries))
    lengths = [[len(each.rows)] if each.span_lengths is None else each.span_lengths for each in choices.values()]
    # The end of a sentence's last range is where the next sentence's first one begins
    bounds = len(steps.places) + np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    firsts = itertools.accumulate(map(len, lengths), initial=0)
    ranges = {
        number: (len(its), bounds.ctypes.data + first * bounds.itemsize)
        for number, its, first in zip(choices, lengths, firsts, strict=False)
    }
    return SentenceSteps(steps.counts, places, entries), ranges, bounds
