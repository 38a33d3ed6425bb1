"""A cell's recurrence in one kernel, all ticks of a round: products, gates, projection and clips, in float32.

By themselves, products of few rows take less time than starting them does, and the gates of many go through memory.
Here a panel of weights makes the gates of 16 cells of a group of rows, which are used up at once. Groups of rows and
directions are jobs that threads take when they are free; no thread waits for another one between ticks. The kernel adds
up in the order that oneDNN's products do, found out by trying, so a sentence has the same bits whichever of the two its
company is computed by; where the order can't be found out, the kernel isn't used.

Legend: R rows, N steps of the round, P projection, C cells, K components of a product's input.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from bilm_model.config import BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.cpu import jobs, panels
from bilm_model.engine.cpu.jobs import (
    arguments_of_jobs,
    end_job,
    publish_jobs,
    spin_for_jobs,
    take_job,
    wait_for_jobs,
)
from bilm_model.engine.cpu.panels import PANEL, PANEL_CELLS, ROWS, multiply_panel, packed, packed_gates
from bilm_model.kernels import cells, numba_blocks
from bilm_model.kernels.cells import lstm_block
from bilm_model.kernels.kernel_cache import compiled
from bilm_model.kernels.numba_blocks import (
    clear_block,
    clip_block,
    copy_block,
    flags,
    float32s,
    inner,
    int64s,
    openmp,
    share,
)
from bilm_model.kernels.products import PackedProduct, padded_rows

MAX_GROUP = 48
"""Rows of a job at most: many enough to make up for reading the weights, few enough for the caches."""

_N_HEADER, _OWN_ADDRESS, _N_CELL = 8, 7, 20
_PANEL_BYTES = 4 * PANEL


@intrinsic
def _fetch(typing_context, address):  # type: ignore[no-untyped-def]
    """Have a cache line brought to the second-level cache."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        name, function = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = builder.module.globals.get(name) or ir.Function(builder.module, function, name)
        builder.call(prefetch, [builder.inttoptr(args[0], byte), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inner
def _fetch_gates(n_rows, at, n_cells, gates_x, index, slots, c):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Have brought what `_gates` will read of memory, while the product is computed."""
    for row in range(n_rows):
        its_gates_x = gates_x + 4 * (int64s(index)[row] * 4 * n_cells + at)
        for gate in range(4):
            _fetch(its_gates_x + 4 * gate * n_cells)
        _fetch(c + 4 * (int64s(slots)[row] * n_cells + at))


@inner
def _gates(n_rows, at, n_cells, gates, gates_x, index, slots, c, m, m_stride, clip):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """From the gates (R, 64) of the cells from `at`, which h adds up to, the cells' outputs m."""
    for row in range(n_rows):
        its_gates, its_m = float32s(gates + row * _PANEL_BYTES), float32s(m + row * m_stride + 4 * at)
        its_gates_x = float32s(gates_x + 4 * (int64s(index)[row] * 4 * n_cells + at))
        its_c = float32s(c + 4 * (int64s(slots)[row] * n_cells + at))
        if n_cells - at >= PANEL_CELLS:  # a number that is known when this is compiled
            lstm_block(PANEL_CELLS, its_gates, PANEL_CELLS, its_gates_x, n_cells, its_c, its_m, clip)
        else:
            lstm_block(n_cells - at, its_gates, PANEL_CELLS, its_gates_x, n_cells, its_c, its_m, clip)


@inner
def _clear_fresh(n_rows, size, n_cells, fresh, h, h_stride, slots, c):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Set the state of rows that begin to 0."""
    for row in range(n_rows):
        if flags(fresh)[row]:
            clear_block(size, float32s(h + row * h_stride))
            clear_block(n_cells, float32s(c + 4 * int64s(slots)[row] * n_cells))


@inner
def _run_group(cell, first, n_group, scratch):  # type: ignore[no-untyped-def]
    """All ticks of the rows from `first` on, at most so many."""
    n_ticks, sizes, gates_x, index, slots, c, fresh, h_state, outputs, size = carray(cell, _N_CELL)[:10]
    n_cells, recurrent, projection, h_block, m_block, h_stride, m_stride, clips = carray(cell, _N_CELL)[10:18]
    h, m, gates = scratch, scratch + n_group * h_stride, scratch + n_group * (h_stride + m_stride)
    n_rows, its_slots, n_panels = min(n_group, int64s(sizes)[0] - first), slots + 8 * first, -(-n_cells // PANEL_CELLS)
    for row in range(n_rows):
        copy_block(size, float32s(h_state + 4 * int64s(its_slots)[row] * size), float32s(h + row * h_stride))
    step = first
    for tick in range(n_ticks):
        n = min(n_rows, int64s(sizes)[tick] - first)
        if n <= 0:
            break
        _clear_fresh(n, size, n_cells, fresh + step, h, h_stride, its_slots, c)
        for i in range(n_panels):
            panel = n_panels - 1 - i if tick % 2 else i  # back and forth: the cache still has what was read last
            its_weight = recurrent + panel * size * _PANEL_BYTES
            at = panel * PANEL_CELLS
            _fetch_gates(n, at, n_cells, gates_x, index + 8 * step, its_slots, c)
            multiply_panel(n, size, h_block, h, h_stride, its_weight, gates, _PANEL_BYTES)
            _gates(n, at, n_cells, gates, gates_x, index + 8 * step, its_slots, c, m, m_stride, float32s(clips)[0])
        if projection != 0:
            for panel in range(-(-size // PANEL)):
                its_weight = projection + panel * n_cells * _PANEL_BYTES
                multiply_panel(n, n_cells, m_block, m, m_stride, its_weight, h + panel * _PANEL_BYTES, h_stride)
        for row in range(n):
            its_h = float32s(h + row * h_stride)
            if projection != 0:
                clip_block(size, its_h, float32s(clips)[1])
            else:
                copy_block(size, float32s(m + row * m_stride), its_h)
            copy_block(size, its_h, float32s(outputs + 4 * (step + row) * size))
        step += int64s(sizes)[tick]
    for row in range(n_rows):
        copy_block(size, float32s(h + row * h_stride), float32s(h_state + 4 * int64s(its_slots)[row] * size))


@inner
def _take_jobs(board, thread):  # type: ignore[no-untyped-def]
    """Run jobs as long as there are any left; `thread` says whose memory to use."""
    while True:
        job = take_job(board)
        if job < 0:
            break
        arguments = arguments_of_jobs(board)
        n_cells, n_group, memory, thread_bytes = carray(int64s(arguments), 7)[3:]
        cell = int64s(carray(int64s(arguments), _N_HEADER + n_cells)[_N_HEADER + job % n_cells])
        _run_group(cell, job // n_cells * n_group, n_group, memory + thread * thread_bytes)
        end_job(board)


# ---- kernels: all threads of a team; the caller; the caller beside a helper; the helper ------------------------------


def _run_in_team(arguments):  # type: ignore[no-untyped-def]
    n_threads, board = carray(arguments, 2)
    thread, _ = share(n_threads, n_threads)
    _take_jobs(int64s(board), thread)


def _run_with_helper(arguments):  # type: ignore[no-untyped-def]
    yield_thread, board, n_jobs = carray(arguments, 3)
    publish_jobs(int64s(board), n_jobs, carray(arguments, _N_HEADER)[_OWN_ADDRESS])
    _take_jobs(int64s(board), 0)
    wait_for_jobs(int64s(board), n_jobs, yield_thread)


def _help(board):  # type: ignore[no-untyped-def]
    while spin_for_jobs(board):
        _take_jobs(board, 1)


def _multiply_all(arguments):  # type: ignore[no-untyped-def]
    n_rows, n_in, block, x, weight, out, n_panels = carray(arguments, 7)
    for panel in range(n_panels):
        its_weight, its_out = weight + panel * n_in * _PANEL_BYTES, out + panel * _PANEL_BYTES
        multiply_panel(n_rows, n_in, block, x, 4 * n_in, its_weight, its_out, n_panels * _PANEL_BYTES)


_KERNEL = types.void(types.CPointer(types.int64))
openmp()  # makes the thread's number known before a kernel is compiled
_team_kernel, _caller_kernel, _helper_kernel, _product = (
    compiled(_KERNEL, {}, function, numba_blocks, cells, panels, jobs)
    for function in (_run_in_team, _run_with_helper, _help, _multiply_all)
)


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
    def of(cls, weight: Tensor) -> "_PanelWeight | None":
        """Lay out a weight (out, K); None if the order of oneDNN's sums can't be found out."""
        (n_out, n_in), weights = weight.shape, packed(weight)
        x = torch.randn(padded_rows(ROWS + 1), n_in, generator=torch.Generator().manual_seed(0))
        expected = PackedProduct(weight)(x)
        for block in (n_in, 1024, 512, 256, 128, 64):
            found = torch.empty(len(x), len(weights) * PANEL)
            addresses = (x.data_ptr(), weights.data_ptr(), found.data_ptr())
            _product.ctypes(_array(len(x), n_in, block, *addresses, len(weights)))
            if torch.equal(found[:, :n_out], expected):
                return cls(weights, block)
        return None


@dataclass(frozen=True, eq=False)
class LaneWork:
    """What a cell is to do in a round, on the lanes' own state.

    Attributes:
        gates_x: (any, 4·C) what inputs add to the gates, biases and the forget gate's +1 included.
        index: (N,) int64, the row of `gates_x` for each step.
        h: (lanes, P) float32 recurrent outputs, changed in place.
        c: (lanes, C) float32 cells, changed in place.
        slots: (R,) int64, the lane of each row.
        fresh: (N,) bool, the step starts from h = c = 0, whatever the lane holds.
        ticks: (K,) int64, rows at each tick, never growing.
    """

    gates_x: Tensor
    index: Tensor
    h: Tensor
    c: Tensor
    slots: Tensor
    fresh: Tensor
    ticks: Tensor


class Recurrence:
    """A cell's ticks; bit for bit what products and elementwise arithmetic give."""

    def __init__(self, recurrent: _PanelWeight, projection: _PanelWeight | None, config: BilmConfig) -> None:
        self._weights, self._clips = (recurrent, projection), torch.tensor([config.cell_clip, config.proj_clip])
        strides = (4 * PANEL * -(-config.projection_dim // PANEL), 4 * PANEL_CELLS * -(-config.cell_dim // PANEL_CELLS))
        self._numbers = (
            config.cell_dim,
            recurrent.panels.data_ptr(),
            0 if projection is None else projection.panels.data_ptr(),
            recurrent.block,
            0 if projection is None else projection.block,
            *strides,
            self._clips.data_ptr(),
        )
        self.row_bytes = sum(strides) + _PANEL_BYTES

    @classmethod
    def of(cls, lstm: ClippedProjectedLstm, config: BilmConfig) -> "Recurrence | None":
        """Return a layer's; None where it can't give the bits of products."""
        if lstm.recurrent.weight.dtype != torch.float32:
            return None
        recurrent = _PanelWeight.of(lstm.recurrent.weight)
        projection = None if lstm.projection is None else _PanelWeight.of(lstm.projection.weight)
        if recurrent is None or (projection is None) != (lstm.projection is None):
            return None
        return cls(_PanelWeight(packed_gates(lstm.recurrent.weight), recurrent.block), projection, config)

    def arguments(self, work: LaneWork, outputs: Tensor) -> "ctypes.Array[ctypes.c_int64]":
        """Return the kernel's arguments, for outputs (N, P)."""
        tensors = (work.ticks, work.gates_x, work.index, work.slots, work.c, work.fresh, work.h, outputs)
        addresses = (tensor.data_ptr() for tensor in tensors)
        return _array(len(work.ticks), *addresses, outputs.shape[1], *self._numbers)


class RecurrenceTeam:
    """Threads that run cells, each with memory for a group of rows."""

    def __init__(self, row_bytes: int, n_threads: int) -> None:
        """Allocate the memory, of which nothing is touched before it is used.

        Args:
            row_bytes: that a row takes while it is computed.
            n_threads: to use at most.
        """
        self._memory = torch.empty(max(2, n_threads), MAX_GROUP * row_bytes, dtype=torch.uint8)
        self._board, self._yield = jobs.new_board(), jobs.yield_address()
        self._n_threads = n_threads
        self._parallel = openmp() if n_threads > 1 else None
        self._helper = jobs.Helper(_follow)

    def run(self, cells: Sequence[tuple[Recurrence, LaneWork]], threads: "Threads") -> list[Tensor]:
        """Run cells that don't depend on one another, for the same ticks and rows; return what each gives, (N, P)."""
        if threads == "team" and self._parallel is None:
            threads = "helper" if self._n_threads > 1 else "caller"
        outputs = [work.h.new_empty(len(work.index), work.h.shape[1]) for _, work in cells]
        arguments = [cell.arguments(work, out) for (cell, work), out in zip(cells, outputs, strict=True)]
        n_rows, n_threads = len(cells[0][1].slots), self._n_threads if threads == "team" else 1
        n_group = _group_rows(n_rows, -(-n_threads // len(cells)))
        n_jobs = len(cells) * -(-n_rows // n_group)
        numbers = (n_jobs, len(cells), n_group, self._memory.data_ptr(), self._memory.stride(0))
        addresses = (ctypes.addressof(each) for each in arguments)
        if threads == "helper":
            self._helper.wake()
        board = self._helper.board if threads == "helper" else ctypes.addressof(self._board)
        first = n_threads if threads == "team" else self._yield
        values = _array(first, board, *numbers, 0, *addresses)
        values[_OWN_ADDRESS] = ctypes.addressof(values)
        if threads == "team" and self._parallel is not None:
            jobs.offer(self._board, n_jobs, values[_OWN_ADDRESS])
            # Always the whole team: OpenMP ends and begins threads when a team's size changes
            self._parallel(_team_kernel.address, values, n_threads, 0)
        else:
            _caller_kernel.ctypes(values)
        return outputs


Threads = Literal["caller", "helper", "team"]
"""Who runs jobs: the calling thread, that and a helper, which is waited for only while it has a job, or OpenMP's."""


def _follow(board: int) -> None:
    _helper_kernel.ctypes((ctypes.c_int64 * jobs.BOARD_SIZE).from_address(board))


def _group_rows(n_rows: int, n_groups: int) -> int:
    """Return the rows of a group: so many groups at least, as far as there are rows for it."""
    rows = -(-n_rows // n_groups)
    return min(MAX_GROUP, -(-rows // ROWS) * ROWS)


def _array(*numbers: int) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(numbers))(*numbers)
