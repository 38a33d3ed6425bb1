"""From a round's layers on a device to what each sentence asked for, on the host: by the round, not by the sentence.

Here plainly, in torch, on any device: the number of operators grows with the different outputs that are asked for, not
with the sentences. `cpu.fused_results` does the same in one kernel.

Legend: L layers with the token layer, N steps of all sentences, n sentences, D width, P projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.engine.backend import Memory
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.transfer import HostCopy, to_device
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import LAYER_NORM_EPSILON, LayerMix, Selection

SHARED_BYTES = 16 * 1024
"""Results from this size on have memory of their own: a part of a round's would keep all of it."""

_TORCH_TYPES: dict[DataType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

Vectors = NDArray[np.generic]


class Collected(Protocol):
    """Results on their way to the host."""

    def done(self) -> bool:
        """Return whether all have arrived."""

    def vectors(self) -> list[Vectors]:
        """Return each sentence's, as its output says; waits for what has not arrived."""


class Collector(Protocol):
    """Makes results of what sentences left in the engine's memory."""

    @property
    def path(self) -> str:
        """What it is, as a label of the metric `bilm_kernel_path`."""

    def collect(self, steps: SentenceSteps, outputs: Sequence[OutputSpec]) -> Collected:
        """Return what each sentence asks for, for sentences of at least one token; their memory may be used again.

        Raises:
            ValueError: If a mix has another number of weights than there are layers.
        """


def converted(vectors: Tensor, data_type: DataType) -> Tensor:
    """Return vectors in a number format; bfloat16 as int16 of its bits, which numpy has."""
    found = vectors.to(_TORCH_TYPES[data_type])
    return found.view(torch.int16) if data_type == "bfloat16" else found


def gather_layers(
    memory: Memory, places: NDArray[np.int64], entries: NDArray[np.int64], layers: Sequence[int]
) -> Tensor:
    """Return layers (len(layers), N, D) of steps, given by their places and entries, copied out of the memory."""
    P, device = memory.vectors.shape[1], memory.vectors.device
    found = torch.empty(len(layers), len(places), 2 * P, device=device)
    at_places, at_entries = to_device(places, device), to_device(entries, device)
    for target, layer in zip(found, layers, strict=True):
        for d, half in enumerate(target.split(P, dim=-1)):
            # A step's outputs lie at the place of the token it read: both directions of a token at the same place
            source, index = (memory.outputs[layer - 1, d], at_places) if layer else (memory.vectors, at_entries)
            half.copy_(source.index_select(0, index))
    return found


def shape_of(n_tokens: int, n_layers: int, width: int, output: OutputSpec) -> tuple[int, ...]:
    """Return the shape of a sentence's vectors: [L] [T] D."""
    layers = (n_layers,) if output.selection.layers == "all" else ()
    return (*layers, width) if output.pooled else (*layers, n_tokens, width)


@dataclass(frozen=True, eq=False)
class _Part:
    """Of the sentences of one output: their numbers, and where each one's vectors are in the copy.

    Attributes:
        numbers: Of the sentences.
        bounds: (first, end) of each one's rows in the copy's last axis but one; None: a row a sentence.
        copy: [L] rows D.
    """

    numbers: Sequence[int]
    bounds: Sequence[tuple[int, int]] | None
    copy: HostCopy


@dataclass(frozen=True, eq=False)
class TorchCollected:
    """`Collected`, with a copy for each different output.

    Attributes:
        count: Of sentences.
        parts: Of them.
    """

    count: int
    parts: Sequence[_Part]

    def done(self) -> bool:
        """See `Collected`."""
        return all(part.copy.done() for part in self.parts)

    def vectors(self) -> list[Vectors]:
        """See `Collected`."""
        found: dict[int, Vectors] = {}
        for part in self.parts:
            whole = part.copy.array()
            rows = [(row, row + 1) for row in range(len(part.numbers))] if part.bounds is None else part.bounds
            for number, (first, end) in zip(part.numbers, rows, strict=True):
                found[number] = whole[..., first, :] if part.bounds is None else whole[..., first:end, :]
        return [_own(found[number]) for number in range(self.count)]


def _own(vectors: Vectors) -> Vectors:
    """Return little-endian vectors that keep nothing much larger than themselves in memory."""
    found = vectors.astype(vectors.dtype.newbyteorder("<"), copy=False)
    return found.copy() if found.nbytes >= SHARED_BYTES or not found.flags.c_contiguous else found


class TorchCollector:
    """`Collector` by torch's operators."""

    path = "torch"

    def __init__(self, memory: Memory) -> None:
        """Set the engine's memory."""
        self._memory = memory

    def collect(self, steps: SentenceSteps, outputs: Sequence[OutputSpec]) -> TorchCollected:
        """See `Collector`."""
        numbers: dict[OutputSpec, list[int]] = {}
        for number, output in enumerate(outputs):
            numbers.setdefault(output, []).append(number)
        ends = np.cumsum(steps.counts)
        begins = ends - steps.counts
        parts = [self._part(output, found, begins[found], ends[found], steps) for output, found in numbers.items()]
        return TorchCollected(len(outputs), parts)

    def _part(
        self,
        output: OutputSpec,
        numbers: Sequence[int],
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
        steps: SentenceSteps,
    ) -> _Part:
        normed = isinstance(output.selection.layers, LayerMix) and output.selection.layers.layer_norm
        if not normed:  # only then are the boundaries read
            begins, ends = begins + 1, ends - 1
        counts = ends - begins
        rows_end = np.cumsum(counts)
        # The steps of these sentences alone, one sentence after another
        of_sentence = np.repeat(np.arange(len(counts)), counts)
        at = np.arange(len(of_sentence)) + (begins - (rows_end - counts))[of_sentence]
        n_layers = len(self._memory.outputs) + 1
        wanted = range(n_layers - 1 if output.selection.layers == "top" else 0, n_layers)
        layers = gather_layers(self._memory, steps.places[at], steps.entries[at], wanted)
        if normed:
            layers = self._normed(layers, counts, of_sentence)
            inner = np.ones(len(at), dtype=bool)
            inner[rows_end - 1] = inner[rows_end - counts] = False
            layers = layers.index_select(1, self._to_device(np.flatnonzero(inner)))
            counts = counts - 2
            rows_end = np.cumsum(counts)
        vectors = self._pooled(_combined(output.selection, layers), output.selection, counts)
        if output.selection.l2_normalize:
            vectors = F.normalize(vectors, dim=-1)
        bounds = None if output.pooled else list(zip((rows_end - counts).tolist(), rows_end.tolist(), strict=True))
        return _Part(numbers, bounds, HostCopy(converted(vectors, output.data_type)))

    def _normed(self, layers: Tensor, counts: NDArray[np.int64], of_sentence: NDArray[np.int64]) -> Tensor:
        """Normalise each layer of each sentence by one mean and variance (see `LayerMix.layer_norm`)."""
        index = self._to_device(of_sentence)
        mean = self._segments(layers.mean(dim=-1), "mean", counts).index_select(1, index)
        centred = layers - mean[..., None]
        variance = self._segments(centred.square().mean(dim=-1), "mean", counts).index_select(1, index)
        return centred / torch.sqrt(variance + LAYER_NORM_EPSILON)[..., None]

    def _pooled(self, vectors: Tensor, selection: Selection, counts: NDArray[np.int64]) -> Tensor:
        """([L] N D) -> [L] n D, or the same if nothing is pooled."""
        if selection.pooling == "none":
            return vectors
        if vectors.dim() == 2:
            return self._segments(vectors[None], selection.pooling, counts)[0]
        return self._segments(vectors, selection.pooling, counts)

    def _segments(self, rows: Tensor, reduce: str, counts: NDArray[np.int64]) -> Tensor:
        """Reduce (L, N, …) over the steps of each sentence -> (L, n, …)."""
        lengths = self._to_device(counts)
        # unsafe: the lengths aren't checked, for which a GPU would have to be waited for
        by_step = rows.transpose(0, 1).contiguous()
        reduced: Tensor = torch.segment_reduce(by_step, reduce, lengths=lengths, axis=0, unsafe=True)
        return reduced.transpose(0, 1)

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        return to_device(array, self._memory.vectors.device)


def _combined(selection: Selection, layers: Tensor) -> Tensor:
    """(L, N, D), normalised already -> [L] N D."""
    if isinstance(selection.layers, LayerMix):
        parts = [share * layer for share, layer in zip(selection.layers.shares(), layers, strict=True)]
        total: Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if selection.layers == "all":
        return layers
    return layers[0] if selection.layers == "top" else layers.mean(dim=0)
