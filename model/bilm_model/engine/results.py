"""From a round's layers on a device to what each sentence asked for, on the host: by the round, not by the sentence.

Here in torch, on any device, a GPU above all: the indices of a round go over in one transfer and its results come back
in another one, and there are as many operators for one sentence as for a thousand. Sentences whose outputs need the
same operators are computed together; a mix has weights by the sentence, which are numbers like others.
`cpu.fused_results` does the same in one kernel.

Legend: L layers with the token layer, N steps of all sentences, n sentences, D width, P projection, A places.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.engine.backend import Memory
from bilm_model.engine.host_ring import FIRST_BYTES, Arrival, HostRing
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.transfer import Sender, Transfers, aligned, transfers_of
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import LAYER_NORM_EPSILON, LayerMix, Pooling, Selection

SHARED_BYTES = 64 * 1024
"""Of memory that pooled results share: bounds what one that is kept keeps beside itself."""
NUMPY_TYPES: dict[DataType, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}
"""What results are on the host; bfloat16, which numpy lacks, as int16 of its bits."""

_KEPT_OUTPUTS = 64
"""Different outputs that are remembered."""

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


def shape_of(n_tokens: int, n_layers: int, width: int, output: OutputSpec) -> tuple[int, ...]:
    """Return the shape of a sentence's vectors: [L] [T] D."""
    layers = (n_layers,) if output.selection.layers == "all" else ()
    return (*layers, width) if output.pooled else (*layers, n_tokens, width)


def grouped(outputs: Sequence[OutputSpec]) -> Iterable[tuple[OutputSpec, Sequence[int]]]:
    """Return each different output, with the numbers of its sentences."""
    if outputs.count(outputs[0]) == len(outputs):
        return [(outputs[0], range(len(outputs)))]
    groups: dict[OutputSpec, list[int]] = {}
    last, numbers = None, list[int]()
    for number, output in enumerate(outputs):
        if output is not last:  # the sentences of a call share theirs
            last, numbers = output, groups.setdefault(output, [])
        numbers.append(number)
    return groups.items()


def shares_of(selection: Selection, n_layers: int) -> NDArray[np.float32] | None:
    """Return what each of the layers (L,) is multiplied by; None: layers are not added up.

    Raises:
        ValueError: If a mix has another number of weights than there are layers.
    """
    if isinstance(selection.layers, LayerMix):
        shares = selection.layers.shares()
        if len(shares) != n_layers:
            raise ValueError(f"a mix has {len(shares)} weights, expected one for each of {n_layers} layers")
        return np.array(shares, dtype=np.float32)
    return np.full(n_layers, 1 / n_layers, dtype=np.float32) if selection.layers == "average" else None


class LayerReader:
    """Reads vectors of steps out of the engine's memory."""

    def __init__(self, memory: Memory) -> None:
        """Set the memory."""
        self._memory = memory
        n_halves, n_places = memory.outputs.shape[0] * 2, memory.outputs.shape[2]
        self._halves = memory.outputs.view(n_halves * n_places, -1)
        # The first place of each layer and direction among all of them
        self._firsts = torch.arange(n_halves, device=memory.outputs.device).mul_(n_places).view(-1, 1, 2)

    @property
    def n_layers(self) -> int:
        """With the token layer."""
        return len(self._firsts) + 1

    @property
    def width(self) -> int:
        """Of a vector."""
        return 2 * self._halves.shape[1]

    def read(self, places: Tensor, entries: Tensor, first: int = 0, out: Tensor | None = None) -> Tensor:
        """Return the layers from a first one on (L - first, N, D) of steps, given by their places and entries (N,).

        Args:
            places: On the device.
            entries: On the device.
            first: The token layer is 0.
            out: Contiguous memory for them.
        """
        P = self._halves.shape[1]
        if out is None:
            out = self._halves.new_empty(self.n_layers - first, len(places), 2 * P)
        halves = out.view(len(out), len(places), 2, P)
        if first == 0:
            halves[0].copy_(self._memory.vectors.index_select(0, entries)[:, None])
            halves = halves[1:]
        # A step's outputs lie at the place of the token it read: both directions of a token at the same place
        rows = places[:, None] + self._firsts[self.n_layers - 1 - len(halves) :]
        torch.index_select(self._halves, 0, rows.view(-1), out=halves.view(-1, P))
        return out


class _Kind(NamedTuple):
    """What decides by which operators a result is made.

    Attributes:
        layers: A mean is a mix.
        normed: Layers are normalised before they are mixed.
        pooling: See `Selection`.
        unit: Vectors are scaled to length 1.
        data_type: See `OutputSpec`.
    """

    layers: Literal["all", "top", "mix"]
    normed: bool
    pooling: Pooling
    unit: bool
    data_type: DataType

    @property
    def plain(self) -> bool:
        """Whether results are what stands in memory."""
        return self.layers != "mix" and self.pooling == "none" and not self.unit and self.data_type == "float32"


@functools.lru_cache(_KEPT_OUTPUTS)
def _kind_of(output: OutputSpec, n_layers: int) -> tuple[_Kind, NDArray[np.float32] | None]:
    """Return the kind of an output, and what its layers are multiplied by, see `shares_of`."""
    selection, shares = output.selection, shares_of(output.selection, n_layers)
    normed = isinstance(selection.layers, LayerMix) and selection.layers.layer_norm
    layers: Literal["all", "top", "mix"] = "top" if selection.layers == "top" else "all" if shares is None else "mix"
    return _Kind(layers, normed, selection.pooling, selection.l2_normalize, output.data_type), shares


@dataclass(frozen=True, eq=False)
class _Group:
    """The sentences of one kind in a round.

    Attributes:
        kind: Of them.
        numbers: Theirs.
        counts: Tokens of each, without boundaries.
        arrays: What the operators read of them, by name.
        shape: Of their results together: (n, L, D) if they are pooled, else (L, tokens of all, D); L is 1 for one
            layer.
        begin: Of their results among the bytes of the round.
    """

    kind: _Kind
    numbers: Sequence[int]
    counts: NDArray[np.int64]
    arrays: dict[str, NDArray[np.generic]]
    shape: tuple[int, int, int]
    begin: int

    @property
    def end(self) -> int:
        """Of their results among the bytes of the round."""
        return self.begin + math.prod(self.shape) * np.dtype(NUMPY_TYPES[self.kind.data_type]).itemsize

    def vectors(self, data: NDArray[np.uint8]) -> Iterator[Vectors]:
        """Yield each sentence's, out of the bytes of the round, in memory that keeps little beside it."""
        little = np.dtype(NUMPY_TYPES[self.kind.data_type])
        whole = data[self.begin : self.end].view(little.newbyteorder("=")).reshape(self.shape)
        picked = slice(None) if self.kind.layers == "all" else 0
        if self.kind.pooling == "none":
            ends = np.cumsum(self.counts).tolist()
            for begin, end in itertools.pairwise([0, *ends]):
                yield whole[:, begin:end].astype(little)[picked]
            return
        n_rows = max(1, SHARED_BYTES // whole[0].nbytes)
        for first in range(0, len(whole), n_rows):
            for vectors in whole[first : first + n_rows].astype(little):
                yield vectors[picked]


def _indices(
    kind: _Kind, steps: SentenceSteps, counts: NDArray[np.int64], begins: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    """Return what operators read of sentences of one kind.

    Args:
        kind: Of them.
        steps: Of all sentences.
        counts: (n,) steps of each, boundaries included.
        begins: (n,) the first of them.
    """
    if not kind.normed:  # only then are the boundaries read
        begins, counts = begins + 1, counts - 2
    ends = np.cumsum(counts)
    of_sentence = np.repeat(np.arange(len(counts)), counts)
    # The steps of these sentences alone, one sentence after another
    at = np.arange(len(of_sentence)) + (begins - (ends - counts))[of_sentence]
    found: dict[str, NDArray[np.generic]] = {"places": steps.places[at], "entries": steps.entries[at]}
    if kind.layers == "mix":
        found["of_sentence"] = of_sentence
    if kind.normed:
        inner = np.ones(len(of_sentence), dtype=bool)
        inner[ends - 1] = inner[ends - counts] = False
        found["inner"], found["steps"] = np.flatnonzero(inner), counts
        counts = counts - 2
    if kind.pooling != "none":
        found["tokens"] = counts
    return found


class TorchCollected:
    """`Collected`, in one copy."""

    def __init__(self, groups: Sequence[_Group], arrival: Arrival) -> None:
        """Set the groups whose results the copy has."""
        self._groups, self._arrival = groups, arrival

    def done(self) -> bool:
        """See `Collected`."""
        return self._arrival.done()

    def vectors(self) -> list[Vectors]:
        """See `Collected`; once."""
        data, found = self._arrival.bytes(), dict[int, Vectors]()
        for group in self._groups:
            found.update(zip(group.numbers, group.vectors(data), strict=True))
        self._arrival.release()
        return [found[number] for number in range(len(found))]


class TorchCollector:
    """`Collector` by torch's operators."""

    path = "torch"

    def __init__(self, memory: Memory, transfers: Transfers | None = None, ring: HostRing | None = None) -> None:
        """Set the engine's memory, how to reach it, and where results come to; None: as its device is reached."""
        self._device = memory.vectors.device
        transfers = transfers or transfers_of(self._device)
        self._reader = LayerReader(memory)
        self._sender = Sender(self._device, transfers)
        all_bytes = self._reader.n_layers * self._reader.width * memory.outputs.shape[2] * 4
        self._ring = ring or HostRing(transfers, min(FIRST_BYTES, all_bytes))

    @torch.inference_mode()
    def collect(self, steps: SentenceSteps, outputs: Sequence[OutputSpec]) -> TorchCollected:
        """See `Collector`."""
        groups = self._groups(steps, outputs)
        sent = iter(self._sender.send([array for group in groups for array in group.arrays.values()]))
        data = torch.empty(groups[-1].end, dtype=torch.uint8, device=self._device)
        for group in groups:
            target = data[group.begin : group.end].view(_TORCH_TYPES[group.kind.data_type]).view(group.shape)
            self._make(group.kind, {name: next(sent) for name in group.arrays}, target)
        return TorchCollected(groups, self._ring.receive(data))

    def _groups(self, steps: SentenceSteps, outputs: Sequence[OutputSpec]) -> list[_Group]:
        """Return the sentences by kind; all that is found out on the host."""
        n_layers, width = self._reader.n_layers, self._reader.width
        kinds: dict[_Kind, list[tuple[Sequence[int], NDArray[np.float32] | None]]] = {}
        for output, numbers in grouped(outputs):
            kind, shares = _kind_of(output, n_layers)
            kinds.setdefault(kind, []).append((numbers, shares))
        begins = np.cumsum(steps.counts) - steps.counts
        groups: list[_Group] = []
        for kind, parts in kinds.items():
            its = [number for numbers, _ in parts for number in numbers]
            counts = steps.counts[its]
            arrays = _indices(kind, steps, counts, begins[its])
            if kind.layers == "mix":
                each = np.stack([shares for _, shares in parts if shares is not None], axis=1)
                arrays["shares"] = np.repeat(each, [len(numbers) for numbers, _ in parts], axis=1)
            n_kept = n_layers if kind.layers == "all" else 1
            n_tokens = int(counts.sum()) - 2 * len(its)
            shape = (n_kept, n_tokens, width) if kind.pooling == "none" else (len(its), n_kept, width)
            begin = aligned(groups[-1].end) if groups else 0
            groups.append(_Group(kind, its, counts - 2, arrays, shape, begin))
        return groups

    def _make(self, kind: _Kind, sent: dict[str, Tensor], target: Tensor) -> None:
        """Write the results of sentences of one kind."""
        first = self._reader.n_layers - 1 if kind.layers == "top" else 0
        layers = self._reader.read(sent["places"], sent["entries"], first, out=target if kind.plain else None)
        if kind.plain:
            return
        rows = _mixed(kind, layers, sent)[None] if kind.layers == "mix" else layers
        if kind.pooling != "none":
            rows = _segments(rows, kind.pooling, sent["tokens"])
        if kind.unit:
            rows = F.normalize(rows, dim=-1)
        target.copy_(rows if kind.pooling == "none" else rows.transpose(0, 1))  # converts, too


def _mixed(kind: _Kind, layers: Tensor, sent: dict[str, Tensor]) -> Tensor:
    """(L, N, D) -> (tokens, D), each sentence by its own shares.

    Normalised layers (see `LayerMix.layer_norm`) are only looked at, not computed: their mix is offset +
    Σ weight · layer.
    """
    of_sentence, weights, offset = sent["of_sentence"], sent["shares"], None
    if kind.normed:
        # Mean and variance of a sentence's layer from those of its vectors, which all have the same number of numbers
        variances, means = torch.var_mean(layers, dim=-1, correction=0)
        mean = _segments(means, "mean", sent["steps"])
        distances = means - mean.index_select(1, of_sentence)
        variance = _segments(variances + distances.square(), "mean", sent["steps"])
        weights = weights / torch.sqrt(variance + LAYER_NORM_EPSILON)
        offset = (weights * mean).sum(0).neg()
    mixed: Tensor = (layers * weights.index_select(1, of_sentence)[..., None]).sum(0)
    if offset is None:
        return mixed
    return (mixed + offset.index_select(0, of_sentence)[:, None]).index_select(0, sent["inner"])


def _segments(rows: Tensor, reduce: str, counts: Tensor) -> Tensor:
    """Reduce (L, N, …) over the steps of each sentence, counts (n,) -> (L, n, …)."""
    # unsafe: the lengths aren't checked, for which a GPU would have to be waited for
    lengths = counts.expand(len(rows), -1)
    reduced: Tensor = torch.segment_reduce(rows, reduce, lengths=lengths, axis=1, unsafe=True)
    return reduced
