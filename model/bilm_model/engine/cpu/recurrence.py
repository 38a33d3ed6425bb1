"""A cell's recurrence in one kernel, all ticks of a round: products, gates, projection and clips, in float32.

By themselves, products of few rows take less time than starting them does, and the gates of many go through memory.
Here a panel of weights makes the gates of 16 cells of a group of rows, which are used up at once. Groups of rows and
directions are jobs that threads take when they are free; no thread waits for another one between ticks. The kernel adds
up in the order that oneDNN's products do, found out by trying, so a sentence has the same bits whichever of the two its
company is computed by; where the order can't be found out, the kernel isn't used.

Legend: R rows, N steps of the round, P projection, C cells, K components of a product's input.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from bilm_model.config import BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.cpu import jobs
from bilm_model.engine.cpu.cell_kernel import KERNELS, MAX_GROUP, OWN_ADDRESS, Kernels, product_kernel
from bilm_model.engine.cpu.panels import PANEL, PANEL_CELLS, ROWS, has_512_bit_registers, packed, packed_gates
from bilm_model.kernels.numba_blocks import openmp
from bilm_model.kernels.products import PackedProduct, padded_rows


@dataclass(frozen=True, eq=False)
class _PanelWeight:
    """A product's weight as the kernel reads it.

    Attributes:
        panels: (panels, K, 64).
        block: components that are added up by themselves.
    """

    panels: Tensor
    block: int

    @classmethod
    def of(cls, weight: Tensor, *, biased: bool = False, gates: bool = False) -> "_PanelWeight | None":
        """Lay out a weight (out, K), by gates or by columns; None if the order of oneDNN's sums can't be found out.

        Args:
            weight: of the product.
            biased: whether a bias is added to the sums.
            gates: whether its columns are those of four gates.
        """
        block = _block(*weight.shape, biased=biased)
        return None if block is None else cls(packed_gates(weight) if gates else packed(weight), block)


@functools.cache
def _block(n_out: int, n_in: int, *, biased: bool) -> int | None:
    """Return the components that oneDNN adds up by themselves in products of a shape; None if that isn't found."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((padded_rows(ROWS + 1), n_in), (n_out, n_in), n_out)
    )
    expected, weights = PackedProduct(weight, bias if biased else None)(x), packed(weight)
    for block in (n_in, 1024, 512, 256, 128, 64):
        found = torch.empty(len(x), len(weights) * PANEL)
        addresses = (x.data_ptr(), weights.data_ptr(), found.data_ptr())
        product_kernel.ctypes(array(len(x), n_in, block, *addresses, len(weights)))
        if torch.equal(found[:, :n_out] + (bias if biased else 0.0), expected):
            return block
    return None


@dataclass(eq=False, slots=True)
class LaneWork:
    """What a cell is to do in a round, on the lanes' own state.

    Attributes:
        x: (N, P) float32 inputs; or (any, 4·C) input projections, biases and the forget gate's +1 included.
        index: (N,) int64, the row of `x` for each step, if these are input projections; None: they are inputs.
        h: (lanes, P) float32 recurrent outputs, changed in place.
        c: (lanes, C) float32 cells, changed in place.
        slots: (R,) int64, the lane of each row.
        fresh: (N,) bool, the step starts from h = c = 0, whatever the lane holds.
        ticks: (K,) int64, rows at each tick, never growing.
    """

    x: Tensor
    index: Tensor | None
    h: Tensor
    c: Tensor
    slots: Tensor
    fresh: Tensor
    ticks: Tensor


@dataclass(frozen=True)
class Grouping:
    """How rows are divided into groups, each with memory for as many as a group has at most.

    Attributes:
        max_rows: of a group.
        step: whose multiples groups have.
        row_bytes: that a row takes while it is computed.
    """

    max_rows: int
    step: int
    row_bytes: int

    @property
    def min_split(self) -> int:
        """Rows from which two groups are as fast as one."""
        return 4 * self.step

    def rows(self, n_rows: int, n_groups: int) -> int:
        """Return the rows of a group: so many groups at least, as far as there are rows for it."""
        rows = -(-n_rows // n_groups)
        return min(self.max_rows, -(-rows // self.step) * self.step)


class Recurrence(Protocol):
    """A layer's ticks in one kernel."""

    @property
    def kernels(self) -> Kernels:
        """What runs it."""

    @property
    def grouping(self) -> Grouping:
        """How its rows are divided into groups."""

    @property
    def description(self) -> str:
        """What of the processor it is for, for people to read."""

    @property
    def reads_projections(self) -> bool:
        """Whether products may have projected its inputs before."""

    def arguments(self, work: LaneWork, outputs: Tensor) -> int:
        """Return the address of the kernel's arguments, for outputs (N, P); the next call overwrites them."""


_N_WORK = 11
"""Arguments of the kernel that say what to do in a round; those behind them are a cell's own."""

_Weights = tuple[_PanelWeight, _PanelWeight | None, _PanelWeight]
"""Of the recurrent product, the projection and the input projections."""


class PanelRecurrence:
    """A cell's ticks; bit for bit what products and elementwise arithmetic give (`Recurrence`)."""

    kernels = KERNELS
    reads_projections = True

    def __init__(self, weights: _Weights, bias: Tensor, config: BilmConfig) -> None:
        self._weights, self._bias = weights, packed_gates(bias[:, None])
        self._clips = torch.tensor([config.cell_clip, config.proj_clip])
        n_panels = -(-config.cell_dim // PANEL_CELLS)
        strides = (4 * PANEL * -(-config.projection_dim // PANEL), 4 * PANEL_CELLS * n_panels)
        recurrent, projection, weight_x = weights
        self._arguments = array(
            *(0,) * _N_WORK,
            config.cell_dim,
            recurrent.panels.data_ptr(),
            0 if projection is None else projection.panels.data_ptr(),
            weight_x.panels.data_ptr(),
            self._bias.data_ptr(),
            recurrent.block,
            0 if projection is None else projection.block,
            weight_x.block,
            *strides,
            self._clips.data_ptr(),
            0,
        )
        self._address = ctypes.addressof(self._arguments)
        self.grouping = Grouping(MAX_GROUP, ROWS, sum(strides) + 4 * PANEL * (1 + n_panels))

    @property
    def description(self) -> str:
        """See `Recurrence`."""
        return f"for {512 if has_512_bit_registers() else 256}-bit registers"

    @classmethod
    def of(cls, lstm: ClippedProjectedLstm, config: BilmConfig) -> "PanelRecurrence | None":
        """Return a layer's; None where it can't give the bits of products."""
        if lstm.recurrent.weight.dtype != torch.float32:
            return None
        bias = lstm.folded_input_bias().detach()
        recurrent = _PanelWeight.of(lstm.recurrent.weight, gates=True)
        projection = None if lstm.projection is None else _PanelWeight.of(lstm.projection.weight)
        weight_x = _PanelWeight.of(lstm.input.weight, biased=True, gates=True)
        if recurrent is None or weight_x is None or (projection is None) != (lstm.projection is None):
            return None
        return cls((recurrent, projection, weight_x), bias, config)

    def arguments(self, work: LaneWork, outputs: Tensor) -> int:
        """Return the address of the kernel's arguments, for outputs (N, P); the next call overwrites them."""
        x = work.x.data_ptr()
        table, index, inputs = (0, 0, x) if work.index is None else (x, work.index.data_ptr(), 0)
        self._arguments[:_N_WORK] = [
            work.ticks.shape[0], work.ticks.data_ptr(), table, index, inputs, work.slots.data_ptr(), work.c.data_ptr(),
            work.fresh.data_ptr(), work.h.data_ptr(), outputs.data_ptr(), outputs.shape[1],
        ]  # fmt: skip
        return self._address


class RecurrenceTeam:
    """Threads that run cells, each with memory for a group of rows."""

    def __init__(self, recurrence: Recurrence, n_threads: int) -> None:
        """Allocate the memory, of which nothing is touched before it is used.

        Args:
            recurrence: one of those that are run, which are of one kind and size.
            n_threads: to use at most.
        """
        self._kernels, self._grouping, self._kind = recurrence.kernels, recurrence.grouping, recurrence.description
        n_bytes = self._grouping.max_rows * self._grouping.row_bytes
        self._memory = torch.empty(max(2, n_threads), n_bytes, dtype=torch.uint8)
        self._board, self._yield = jobs.new_board(), jobs.yield_address()
        self._n_threads = n_threads
        self._parallel = openmp() if n_threads > 1 else None
        self._helper = jobs.Helper(functools.partial(_follow, self._kernels))

    @property
    def description(self) -> str:
        """The kernel and who runs it, for people to read."""
        helpers = {1: "", 2: " with a helper"}.get(self._n_threads, " with a helper or a team")
        return f"all ticks of a cell in one kernel {self._kind}{helpers}"

    def run(self, cells: Sequence[tuple[Recurrence, LaneWork]], threads: "Threads") -> list[Tensor]:
        """Run cells that don't depend on one another, for the same ticks and rows; return what each gives, (N, P)."""
        if threads == "team" and self._parallel is None:
            threads = "helper" if self._n_threads > 1 else "caller"
        outputs = [torch.empty(work.fresh.shape[0], work.h.shape[1]) for _, work in cells]
        addresses = [cell.arguments(work, out) for (cell, work), out in zip(cells, outputs, strict=True)]
        n_rows, n_threads = cells[0][1].slots.shape[0], self._n_threads if threads == "team" else 1
        # A helper may come late: then the caller should find more than one job of a cell to take
        splits = threads == "helper" and n_rows >= self._grouping.min_split
        n_group = self._grouping.rows(n_rows, 2 if splits else -(-n_threads // len(cells)))
        n_jobs = len(cells) * -(-n_rows // n_group)
        numbers = (n_jobs, len(cells), n_group, self._memory.data_ptr(), self._memory.stride(0))
        if threads == "helper":
            self._helper.wake()
        board = self._helper.board if threads == "helper" else ctypes.addressof(self._board)
        first = n_threads if threads == "team" else self._yield
        values = array(first, board, *numbers, 0, *addresses)
        values[OWN_ADDRESS] = ctypes.addressof(values)
        if threads == "team" and self._parallel is not None:
            jobs.offer(self._board, n_jobs, values[OWN_ADDRESS])
            # Always the whole team: OpenMP ends and begins threads when a team's size changes
            self._parallel(self._kernels.team.address, values, n_threads, 0)
        else:
            self._kernels.caller.ctypes(values)
        return outputs


Threads = Literal["caller", "helper", "team"]
"""Who runs jobs: the calling thread, that and a helper, which is waited for only while it has a job, or OpenMP's."""


def _follow(kernels: Kernels, board: int) -> None:
    kernels.helper.ctypes((ctypes.c_int64 * jobs.BOARD_SIZE).from_address(board))


def array(*numbers: int) -> "ctypes.Array[ctypes.c_int64]":
    """Return numbers as kernels take them."""
    return (ctypes.c_int64 * len(numbers))(*numbers)
