"""A cell's recurrence as one kernel: all ticks of a round for a group of rows, with products, gates and clips.

Legend: R rows of a group, N steps of the round, P projection, C cells, K components of a product's input.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from bilm_model.engine.cpu import jobs, panels
from bilm_model.engine.cpu.jobs import (
    arguments_of_jobs,
    end_job,
    publish_jobs,
    spin_for_jobs,
    take_job,
    wait_for_jobs,
)
from bilm_model.engine.cpu.panels import PANEL, PANEL_CELLS, multiply_panel
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

MAX_GROUP = 48
"""Rows of a group at most: many enough to make up for reading the weights, few enough for the caches."""

N_HEADER, OWN_ADDRESS = 8, 7
"""Arguments before the cells' addresses, and the place among them of the arguments' own address."""


@dataclass(frozen=True)
class Kernels:
    """What runs the jobs of a board.

    Attributes:
        team: each of OpenMP's threads.
        caller: the calling thread, which offers them first, and waits for the helper.
        helper: the thread beside it.
    """

    team: Any
    caller: Any
    helper: Any


_N_CELL = 23
_PANEL_BYTES = 4 * PANEL
_GROUP_PANEL_BYTES = MAX_GROUP * _PANEL_BYTES


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
        if index != 0:
            its_gates_x = gates_x + 4 * (int64s(index)[row] * 4 * n_cells + at)
            for gate in range(4):
                _fetch(its_gates_x + 4 * gate * n_cells)
        _fetch(c + 4 * (int64s(slots)[row] * n_cells + at))


@inner
def _gates(n_rows, at, n_cells, gates, gates_x, index, slots, c, m, m_stride, clip):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Make the cells' outputs m of the gates (R, 64) of the cells from `at`, to which `gates_x` is added.

    That is a table with an index, or (R, 64) like the gates.
    """
    for row in range(n_rows):
        its_gates, its_m = float32s(gates + row * _PANEL_BYTES), float32s(m + row * m_stride + 4 * at)
        its_gates_x, x_stride = gates_x + row * _PANEL_BYTES, PANEL_CELLS
        if index != 0:
            its_gates_x, x_stride = gates_x + 4 * (int64s(index)[row] * 4 * n_cells + at), n_cells
        its_c = float32s(c + 4 * (int64s(slots)[row] * n_cells + at))
        if n_cells - at >= PANEL_CELLS:  # a number that is known when this is compiled
            lstm_block(PANEL_CELLS, its_gates, PANEL_CELLS, float32s(its_gates_x), x_stride, its_c, its_m, clip)
        else:
            lstm_block(n_cells - at, its_gates, PANEL_CELLS, float32s(its_gates_x), x_stride, its_c, its_m, clip)


@inner
def n_projected(tick, n_ticks, sizes, first, n_rows, most):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Return how many ticks' inputs to project at once, `most` steps: they lie one behind the other if all rows do."""
    n_steps, end = n_rows, tick + 1
    while first == 0 and end < n_ticks and sizes[tick] == n_rows and n_steps + sizes[end] <= most:
        n_steps += sizes[end]
        end += 1
    return n_steps, end


@inner
def _project(n_steps, size, n_panels, block, x, weight, bias, gates_x):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Gates_x (panels, 48, 64) = x (steps, P)·weight + bias, for up to 48 steps."""
    for panel in range(n_panels):
        its_gates, its_bias = gates_x + panel * _GROUP_PANEL_BYTES, float32s(bias + panel * _PANEL_BYTES)
        its_weight = weight + panel * size * _PANEL_BYTES
        multiply_panel(n_steps, size, block, x, 4 * size, its_weight, its_gates, _PANEL_BYTES)
        for step in range(n_steps):
            gates = float32s(its_gates + step * _PANEL_BYTES)
            for k in range(PANEL):
                gates[k] = gates[k] + its_bias[k]


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
    n_ticks, sizes, table, index, x, slots, c, fresh, h_state, outputs, size = carray(cell, _N_CELL)[:11]
    n_cells, recurrent, projection, weight_x, bias = carray(cell, _N_CELL)[11:16]
    h_block, m_block, x_block, h_stride, m_stride, clips = carray(cell, _N_CELL)[16:22]
    h, m, gates = scratch, scratch + n_group * h_stride, scratch + n_group * (h_stride + m_stride)
    projected = gates + n_group * _PANEL_BYTES
    n_rows, its_slots, n_panels = min(n_group, int64s(sizes)[0] - first), slots + 8 * first, -(-n_cells // PANEL_CELLS)
    for row in range(n_rows):
        copy_block(size, float32s(h_state + 4 * int64s(its_slots)[row] * size), float32s(h + row * h_stride))
    step, projected_step, projected_end = first, 0, 0
    for tick in range(n_ticks):
        n = min(n_rows, int64s(sizes)[tick] - first)
        if n <= 0:
            break
        if x != 0 and tick == projected_end:
            n_steps, projected_end = n_projected(tick, n_ticks, int64s(sizes), first, n, MAX_GROUP)
            _project(n_steps, size, n_panels, x_block, x + 4 * step * size, weight_x, bias, projected)
            projected_step = step
        its_index = index + 8 * step if index != 0 else 0
        _clear_fresh(n, size, n_cells, fresh + step, h, h_stride, its_slots, c)
        for i in range(n_panels):
            panel = n_panels - 1 - i if tick % 2 else i  # back and forth: the cache still has what was read last
            at, its_weight = panel * PANEL_CELLS, recurrent + panel * size * _PANEL_BYTES
            gates_x = (
                projected + panel * _GROUP_PANEL_BYTES + (step - projected_step) * _PANEL_BYTES if x != 0 else table
            )
            _fetch_gates(n, at, n_cells, gates_x, its_index, its_slots, c)
            multiply_panel(n, size, h_block, h, h_stride, its_weight, gates, _PANEL_BYTES)
            _gates(n, at, n_cells, gates, gates_x, its_index, its_slots, c, m, m_stride, float32s(clips)[0])
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
def take_jobs(board, thread, run_group):  # type: ignore[no-untyped-def]
    """Run jobs as long as there are any left; `thread` says whose memory to use."""
    while True:
        job = take_job(board)
        if job < 0:
            break
        arguments = arguments_of_jobs(board)
        n_cells, n_group, memory, thread_bytes = carray(int64s(arguments), 7)[3:]
        cell = int64s(carray(int64s(arguments), N_HEADER + n_cells)[N_HEADER + job % n_cells])
        run_group(cell, job // n_cells * n_group, n_group, memory + thread * thread_bytes)
        end_job(board)


# ---- kernels: all threads of a team; the caller; the caller beside a helper; the helper ------------------------------


def _run_in_team(arguments):  # type: ignore[no-untyped-def]
    n_threads, board = carray(arguments, 2)
    thread, _ = share(n_threads, n_threads)
    take_jobs(int64s(board), thread, _run_group)


def _run_with_helper(arguments):  # type: ignore[no-untyped-def]
    yield_thread, board, n_jobs = carray(arguments, 3)
    publish_jobs(int64s(board), n_jobs, carray(arguments, N_HEADER)[OWN_ADDRESS])
    take_jobs(int64s(board), 0, _run_group)
    wait_for_jobs(int64s(board), n_jobs, yield_thread)


def _help(board):  # type: ignore[no-untyped-def]
    while spin_for_jobs(board):
        take_jobs(board, 1, _run_group)


def _multiply_all(arguments):  # type: ignore[no-untyped-def]
    n_rows, n_in, block, x, weight, out, n_panels = carray(arguments, 7)
    for panel in range(n_panels):
        its_weight, its_out = weight + panel * n_in * _PANEL_BYTES, out + panel * _PANEL_BYTES
        multiply_panel(n_rows, n_in, block, x, 4 * n_in, its_weight, its_out, n_panels * _PANEL_BYTES)


_KERNEL = types.void(types.CPointer(types.int64))
openmp()  # makes the thread's number known before a kernel is compiled
product_kernel, *_kernels = (
    compiled(_KERNEL, {}, function, numba_blocks, cells, panels, jobs)
    for function in (_multiply_all, _run_in_team, _run_with_helper, _help)
)
KERNELS = Kernels(*_kernels)
