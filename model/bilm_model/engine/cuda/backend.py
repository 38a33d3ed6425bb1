"""The engine's CUDA back end: a tick is a few kernels for both directions, captured as a graph for each number of rows.

What decides the shape of it, at original size in bfloat16 on a GPU of the H100 class:
- One row: a tick of a layer reads 42 MB of weights, 13 µs at 3.3 TB/s; a kernel's start costs 2 µs within a graph and
  5 to 10 µs from Python. So: graphs of several ticks, both directions in one kernel, and three kernels a tick (cells,
  projection, outputs; in float32 the cells are two, product and gates). The projection has so few results (2·512) that
  a few of the 132 multiprocessors would read all of its weights: its cells are cut into slices, which are products of
  their own.
- Many rows: a step of a layer is 0.11 µs of products at 700 TFLOP/s and as much for 350 KB of gates and cells. So:
  gates in bfloat16 and in the kernel of their product, whose results never reach memory, and biases in the input
  projections' products.
- Python takes a millisecond for a round of a thousand rows: a round must be long enough to hide it.

Legend: R rows, N steps of the round, P projection, C cells, K slices of the cells, U different tokens, S slots.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilm_model.bilm import Bilm
from bilm_model.characters import CharacterIds
from bilm_model.engine.backend import Memory
from bilm_model.engine.cuda.fastest import fastest_steps, triton_steps
from bilm_model.engine.cuda.graphs import Captures, Graph, cuda_captures
from bilm_model.engine.cuda.inputs import CachedInputs, FirstInputs, RoundInputs, multiply_inputs
from bilm_model.engine.cuda.schedule import FIRST_INPUTS, LATER_INPUTS, Schedule
from bilm_model.engine.cuda.steps import Steps, TorchSteps
from bilm_model.engine.encoder import WindowEncoder
from bilm_model.engine.planner import Indices, RoundPlan
from bilm_model.engine.transfer import to_device
from bilm_model.kernels.elementwise import TorchElementwise
from bilm_model.kernels.product_paths import ProductPath
from bilm_model.kernels.products import PlainProduct

_MIN_BLOCK_ROWS = 8192
_TICKS_WHEN_FULL = 8
_GRAPH_TICKS = (16, 4, 1)
"""Of one graph: 22 ticks are four launches that way, not 22."""
_EXACT_BUCKETS = 64
_TILE = 128
_MIN_SLICE = 256


def row_bucket(n_rows: int) -> int:
    """Return how many rows to compute for so many.

    To 64 rows the time is that of reading the weights, and powers of two will do; beyond, steps of a quarter of the
    power of two below.
    """
    if n_rows <= _EXACT_BUCKETS:
        return 1 << (n_rows - 1).bit_length()
    step = 1 << ((n_rows - 1).bit_length() - 3)
    return -(-n_rows // step) * step


def n_slices(n_rows: int, n_cells: int, n_components: int, n_multiprocessors: int) -> int:
    """Into how many slices to cut the cells, so that the projection's tiles keep the multiprocessors busy."""
    tiles = 2 * -(-n_rows // _TILE) * -(-n_components // _TILE)
    n = 1
    while 2 * n * tiles <= n_multiprocessors and n_cells % (2 * n) == 0 and n_cells // (2 * n) >= _MIN_SLICE:
        n *= 2
    return n


@dataclass(frozen=True, eq=False)
class _CudaCell:
    """One layer, both directions.

    Attributes:
        input_weights: two of (P, 4·C).
        input_biases: two of (4·C,), the forget gate's constant included.
        recurrent: (2, P, 4·C).
        projection: (2, C, P); None where the cells' output is h.
    """

    input_weights: tuple[Tensor, Tensor]
    input_biases: tuple[Tensor, Tensor]
    recurrent: Tensor
    projection: Tensor | None

    @classmethod
    def of(cls, bilm: Bilm, layer: int) -> "_CudaCell":
        forward, backward = (bilm.lstms(direction)[layer] for direction in range(2))
        projections = [
            lstm.projection.weight.detach().t() for lstm in (forward, backward) if lstm.projection is not None
        ]
        recurrent = torch.stack([lstm.recurrent.weight.detach() for lstm in (forward, backward)])
        return cls(
            input_weights=(forward.input.weight.detach().t(), backward.input.weight.detach().t()),
            input_biases=(
                forward.folded_input_bias().to(bilm.product_dtype),
                backward.folded_input_bias().to(bilm.product_dtype),
            ),
            recurrent=recurrent.transpose(1, 2),
            # Rows are cells: so a slice of the cells is a part of the memory, whatever its size
            projection=torch.stack(projections).contiguous() if projections else None,
        )


class CudaBackend:
    """See `backend.Backend`. On CPU tensors it runs without graphs, for tests.

    Attributes:
        graphs: captured ticks, by layer, bucket and number of ticks; empty before `prepare`.
    """

    def __init__(
        self,
        bilm: Bilm,
        memory: Memory,
        max_rows: int,
        max_ticks: int,
        *,
        input_cache_bytes: int = 0,
        steps: Steps | None = None,
        block_rows: int | None = None,
        captures: Captures | None = None,
    ) -> None:
        """Move the biLM to the memory's device and take its parameters.

        Args:
            bilm: its products in the format that they are to be computed in.
            memory: on the device to use.
            max_rows: rows of a round at most.
            max_ticks: ticks of a round at most.
            input_cache_bytes: for layer 1's input projections; 0: none are kept.
            steps: the arithmetic; None: the fastest that works.
            block_rows: steps of a round at most; None: enough to hide the time that Python takes for it.
            captures: how ticks become graphs; None: those of a GPU, and none on a CPU.

        Raises:
            ConfigError: if that isn't enough for one round.
        """
        self._device = memory.vectors.device
        config = self._config = bilm.to(self._device).config
        self.memory = memory
        self.block_rows = block_rows or max(_MIN_BLOCK_ROWS, _TICKS_WHEN_FULL * max_rows)
        self._encoder = WindowEncoder(bilm.encoder, config, PlainProduct, TorchElementwise())
        self._cells = [_CudaCell.of(bilm, layer) for layer in range(config.n_layers)]
        self._buckets = sorted({min(row_bucket(n), max_rows) for n in range(1, max_rows + 1)})
        self._schedule = Schedule(self._device, max_ticks, max_rows, self.block_rows)
        self._buffers = _Buffers(self._cells[0], self._device, self._buckets, self.block_rows)
        cell, projections = self._cells[0], self._buffers.projections
        first = RoundInputs(cell.input_weights, cell.input_biases, memory.vectors, projections)
        self._first: FirstInputs = CachedInputs(first, input_cache_bytes) if input_cache_bytes else first
        with self._on_device():
            self._steps = steps or self._fastest_steps(bilm.product_dtype)
        self._captures = captures or (cuda_captures if self._device.type == "cuda" else None)
        self.graphs: dict[tuple[int, int, int], Graph] = {}

    @property
    def name(self) -> str:
        """See `Backend`."""
        is_cuda = self._device.type == "cuda"
        gpu = f" {torch.cuda.get_device_name(self._device)}" if is_cuda else ""
        way = f"{len(self.graphs)} captured graphs" if self.graphs else "without graphs"
        return f"{self._device}{gpu} (torch {torch.__version__}, {way}, {self._steps.name})"

    @property
    def paths(self) -> dict[str, str]:
        """See `Backend`."""
        return {
            "products": ProductPath.PLAIN.value,
            "elementwise": self._steps.path,
            "recurrence": "graphs" if self.graphs else "ticks",
        }

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture all graphs, and replay each of them once, which uploads it.

        A capture takes milliseconds, and nothing else may run on the device meanwhile. To be called while nothing is in
        flight. Without it everything works, slowly. After an error there are no graphs.
        """
        if self._captures is None or self.graphs:
            return
        self._schedule.clear()
        graphs: dict[tuple[int, int, int], Graph] = {}
        with self._captures(self._device) as capture:
            for bucket, layer in itertools.product(reversed(self._buckets), range(len(self._cells))):
                self._schedule.clock.zero_()
                self.tick(layer, bucket)  # compiles, and lets cuBLAS allocate, which a capture doesn't allow
                for n_ticks in _GRAPH_TICKS:
                    graphs[layer, bucket, n_ticks] = capture(functools.partial(self._ticks, layer, bucket, n_ticks))
            for graph in graphs.values():
                self._schedule.clock.zero_()
                graph.replay()
        self.graphs = graphs

    def encode(self, entries: Indices, ids: CharacterIds) -> None:
        """See `Backend`."""
        with self._on_device():
            self.memory.vectors.index_copy_(0, to_device(entries, self._device), self._encoder(ids))

    def forget(self, entries: Indices) -> None:
        """See `Backend`."""
        self._first.forget(entries)

    def run(self, plan: RoundPlan, entries: Indices) -> None:
        """See `Backend`. Returns before the device is done."""
        n_rows, n_steps = len(plan.slots), plan.places.shape[1]
        with self._on_device():
            self._begin(plan, entries)
            slots = self._schedule.slots[:n_rows]
            for layer, cell in enumerate(self._cells):
                if layer:
                    self._fill_projections(cell, n_steps)
                self._buffers.h_next[:, :n_rows] = self.memory.h[layer].index_select(1, slots)
                self._schedule.clock.zero_()
                for bucket, n_ticks in self._stretches(plan.sizes):
                    self._run_ticks(layer, bucket, n_ticks)

    def _begin(self, plan: RoundPlan, entries: Indices) -> None:
        """Send what the round is about, and fill the first layer's input projections."""
        first_inputs, missing = self._first.plan(entries)
        if self._config.residual != "input_to_input":
            self._first.fill(self._schedule.send(plan, first_inputs, missing))
            return
        # Here the first layer's kernel needs, step by step, the tokens that its input projections came of
        sent = self._schedule.send(plan, first_inputs, np.concatenate([entries.ravel(), missing]))
        tokens, words = sent.split([entries.size, len(missing)])
        n_steps = entries.shape[1]
        self._buffers.x[:, :n_steps] = self.memory.vectors.index_select(0, tokens).view(2, n_steps, -1)
        self._first.fill(words)

    def _fastest_steps(self, dtype: torch.dtype) -> Steps:
        return TorchSteps() if self._device.type != "cuda" else fastest_steps(self._device, [dtype], triton_steps)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _stretches(self, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Ticks one after another with the same bucket: which, and how many."""
        for bucket, ticks in itertools.groupby(min(row_bucket(n), self._buckets[-1]) for n in sizes):
            yield bucket, len(list(ticks))

    def _run_ticks(self, layer: int, bucket: int, n_ticks: int) -> None:
        if not self.graphs:
            self._ticks(layer, bucket, n_ticks)
            return
        for of_graph in _GRAPH_TICKS:
            n_replays, n_ticks = divmod(n_ticks, of_graph)
            for _ in range(n_replays):
                self.graphs[layer, bucket, of_graph].replay()

    def _ticks(self, layer: int, bucket: int, n_ticks: int) -> None:
        for _ in range(n_ticks):
            self.tick(layer, bucket)

    def _fill_projections(self, cell: _CudaCell, n_steps: int) -> None:
        """A later layer's input projections: forward's steps, then backward's."""
        x = self._buffers.x[:, :n_steps].to(cell.recurrent.dtype)
        for d, out in enumerate(self._buffers.projections[: 2 * n_steps].split(n_steps)):
            multiply_inputs(x[d], cell.input_weights[d], cell.input_biases[d], out)

    def tick(self, layer: int, bucket: int) -> None:
        """Execute the next tick of a layer; what it is about stands in the schedule."""
        cell, config, memory, buffers = self._cells[layer], self._config, self.memory, self._buffers
        m, parts = buffers.of(bucket)
        gates_x, column = (buffers.projections, LATER_INPUTS) if layer else (self._first.projections, FIRST_INPUTS)
        h, c = buffers.h_next[:, :bucket], memory.c[layer]
        self._steps.cells(self._schedule, column, h, cell.recurrent, gates_x, c=c, clip=config.cell_clip, m=m)
        if cell.projection is not None:
            _multiply_exactly(m, cell.projection.view(len(m), m.shape[2], -1), parts)
        self._steps.outputs(
            self._schedule,
            m if cell.projection is None else parts,
            clip=float("inf") if cell.projection is None else config.proj_clip,
            residual="none" if config.residual == "published" and layer == 0 else config.residual,
            h=memory.h[layer],
            h_next=buffers.h_next,
            x=buffers.x,
            outputs=memory.outputs[layer],
        )


class _Buffers:
    """What the kernels of a round pass on to each other, always at the same addresses.

    Attributes:
        projections: (2·N, 4·C) input projections.
        h_next: (2, R, P) recurrent outputs, one row after another.
        x: (2, N, P) float32 what the layer reads, then what the next one reads. What the first layer reads stands here
            only if it is to be added.
    """

    def __init__(self, cell: _CudaCell, device: torch.device, buckets: list[int], max_steps: int) -> None:
        (_, P, n_gates), dtype, max_rows = cell.recurrent.shape, cell.recurrent.dtype, buckets[-1]
        self._n_gates, self._n_components, self._has_projection = n_gates, P, cell.projection is not None
        is_cuda = device.type == "cuda"
        # On a CPU, where its speed doesn't matter, as on an H100
        n_processors = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 132
        self._slices = {
            bucket: n_slices(bucket, n_gates // 4, P, n_processors) if self._has_projection else 1 for bucket in buckets
        }
        self.projections = torch.empty(2 * max_steps, n_gates, dtype=dtype, device=device)
        self.h_next = torch.zeros(2, max_rows, P, dtype=dtype, device=device)
        self.x = torch.empty(2, max_steps, P, device=device)
        self._m = torch.empty(2 * max_rows * n_gates // 4, dtype=dtype, device=device)
        n_parts = max(2 * n * bucket for bucket, n in self._slices.items())
        self._parts = torch.empty(n_parts * P if self._has_projection else 0, device=device)

    def of(self, bucket: int) -> tuple[Tensor, Tensor]:
        """Return m (2·K, R, C/K) and parts (2·K, R, P) float32 for so many rows, see `Steps`."""
        n_parts = 2 * self._slices[bucket]
        shapes = (
            (n_parts, bucket, self._n_gates // 4 // (n_parts // 2)),
            (n_parts, bucket, self._n_components) if self._has_projection else (0,),
        )
        m, parts = (
            buffer[: torch.Size(shape).numel()].view(shape)
            for buffer, shape in zip((self._m, self._parts), shapes, strict=True)
        )
        return m, parts


def _multiply_exactly(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """A batched product into float32, whatever the factors' format."""
    if x.dtype == out.dtype:
        torch.bmm(x, weight, out=out)
    elif x.is_cuda:
        torch.bmm(x, weight, torch.float32, out=out)
    else:
        torch.bmm(x.float(), weight.float(), out=out)
