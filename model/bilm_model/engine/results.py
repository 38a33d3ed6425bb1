"""From a round's layers on a device to what each sentence asked for, on the host: by the round, not by the sentence.

Here in torch, on any device, a GPU above all: the indices of a round go over in one transfer and its results come back
in another one, and there are as many operators for one sentence as for a thousand. Sentences whose outputs need the
same operators are computed together; a mix has weights by the sentence, which are numbers like others.
`cpu.fused_results` does the same in one kernel.

Legend: L layers with the token layer, N steps of all sentences, n sentences, D width, P projection, A places.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bilm_model.engine.backend import Memory
from bilm_model.engine.host_ring import FIRST_BYTES, Arrival, HostRing
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.result_groups import Choices, ResultGroup, ResultKind, Vectors, groups_of, runs_of
from bilm_model.engine.transfer import Sender, Transfers, transfers_of
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import LAYER_NORM_EPSILON

_TORCH_TYPES: dict[DataType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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

    def collect(self, steps: SentenceSteps, outputs: Sequence[OutputSpec], choices: Choices) -> Collected:
        """Return what each sentence asks for, for sentences of at least one token; their memory may be used again.

        A choice changes no bit: it returns what would stand in the result for all tokens, or what pooling makes of
        that.

        Raises:
            ValueError: If a mix has another number of weights than there are layers.
        """


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


class TorchCollected:
    """`Collected`, in one copy."""

    def __init__(self, groups: Sequence[ResultGroup], arrival: Arrival) -> None:
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


class CollectedRuns:
    """`Collected`, of one run of sentences behind the other."""

    def __init__(self, runs: Sequence[Collected]) -> None:
        """Set the runs."""
        self._runs = runs

    def done(self) -> bool:
        """See `Collected`."""
        return all(run.done() for run in self._runs)

    def vectors(self) -> list[Vectors]:
        """See `Collected`; once."""
        return [vectors for run in self._runs for vectors in run.vectors()]


class TorchCollector:
    """`Collector` by torch's operators."""

    path = "torch"

    def __init__(self, memory: Memory, transfers: Transfers | None = None, ring: HostRing | None = None) -> None:
        """Set the engine's memory, how to reach it, and where results come to; None: as its device is reached."""
        self._device = memory.vectors.device
        transfers = transfers or transfers_of(self._device)
        self._reader = LayerReader(memory)
        self._sender = Sender(self._device, transfers)
        self._max_rows = memory.outputs.shape[2]
        all_bytes = self._reader.n_layers * self._reader.width * self._max_rows * 4
        self._ring = ring or HostRing(transfers, min(FIRST_BYTES, all_bytes))

    @torch.inference_mode()
    def collect(self, steps: SentenceSteps, outputs: Sequence[OutputSpec], choices: Choices) -> Collected:
        """See `Collector`.

        A token may be chosen again and again, so chosen rows can be more than the memory's places. Then they come in
        runs, each of which needs no more memory than all places do.
        """
        runs = runs_of(steps, choices, self._max_rows) if choices else ()
        if len(runs) <= 1:
            return self._collect(steps, outputs, choices)
        ends = np.cumsum(steps.counts)
        found = []
        for run in runs:
            its = slice(ends[run.start] - steps.counts[run.start], ends[run.stop - 1])
            part = SentenceSteps(steps.counts[run.start : run.stop], steps.places[its], steps.entries[its])
            chosen = {number - run.start: choices[number] for number in run if number in choices}
            found.append(self._collect(part, outputs[run.start : run.stop], chosen))
        return CollectedRuns(found)

    def _collect(self, steps: SentenceSteps, outputs: Sequence[OutputSpec], choices: Choices) -> TorchCollected:
        groups = groups_of(steps, outputs, choices, self._reader.n_layers, self._reader.width)
        sent = iter(self._sender.send([array for group in groups for array in group.arrays.values()]))
        data = torch.empty(groups[-1].end, dtype=torch.uint8, device=self._device)
        for group in groups:
            target = data[group.begin : group.end].view(_TORCH_TYPES[group.kind.data_type]).view(group.shape)
            self._make(group.kind, {name: next(sent) for name in group.arrays}, target)
        return TorchCollected(groups, self._ring.receive(data))

    def _make(self, kind: ResultKind, sent: dict[str, Tensor], target: Tensor) -> None:
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


def _mixed(kind: ResultKind, layers: Tensor, sent: dict[str, Tensor]) -> Tensor:
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
    """Reduce (L, N, …) over so many steps each, counts (n,) -> (L, n, …)."""
    # unsafe: the lengths aren't checked, for which a GPU would have to be waited for
    lengths = counts.expand(len(rows), -1)
    reduced: Tensor = torch.segment_reduce(rows, reduce, lengths=lengths, axis=1, unsafe=True)
    return reduced
