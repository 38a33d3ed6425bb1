"""A cell's recurrence as one kernel with products of bfloat16 factors: all ticks of a round for a group of rows.

As `cell_kernel`, except that tiles compute the products, and that what these read is rounded to bfloat16. Sums, gates,
cells and outputs are in float32.

Legend: R rows of a group, N steps of the round, P projection, C cells, G rows of a group at most.
"""

from numba import carray, types

from bilm_model.engine.cpu import cell_kernel, jobs, panels, tiles
from bilm_model.engine.cpu.cell_kernel import N_HEADER, OWN_ADDRESS, Kernels, n_projected, take_jobs
from bilm_model.engine.cpu.jobs import publish_jobs, spin_for_jobs, wait_for_jobs
from bilm_model.engine.cpu.panels import PANEL, PANEL_CELLS
from bilm_model.engine.cpu.tiles import TILE_BYTES, TILE_COMPONENTS, close_tiles, multiply_tiles, open_tiles
from bilm_model.kernels import cells, numba_blocks
from bilm_model.kernels.cells import lstm_block
from bilm_model.kernels.kernel_cache import compiled
from bilm_model.kernels.numba_blocks import (
    bfloat16s,
    clear_block,
    clip_block,
    copy_block,
    flags,
    float32s,
    inner,
    int64s,
    load,
    openmp,
    share,
    shifted,
    store,
)

MAX_TILED_GROUP = 64
"""Rows of a group at most: tiles are the fastest in squares of 32 rows, and more rows' projections fill the caches."""

_N_CELL = 17
_PANEL_BYTES = 4 * PANEL
_GROUP_PANEL_BYTES = MAX_TILED_GROUP * _PANEL_BYTES


@inner
def _round(n, source, target):  # type: ignore[no-untyped-def]
    """Write n float32 numbers as bfloat16."""
    for k in range(n):
        store(target, k, source[k])


@inner
def _clear_ends(n_rows, n, rows, stride):  # type: ignore[no-untyped-def]
    """Set the components behind the n-th of bfloat16 rows, which fill up a tile, to 0: weights have zeros there."""
    for row in range(n_rows):
        clear_block(stride // 2 - n, shifted(bfloat16s(rows + row * stride), n))


@inner
def _project(n_steps, size, n_panels, x, rounded, weight, bias, gates_x):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Gates_x (panels, G, 64) = x (steps, P)·weight + bias, for up to G steps."""
    n = -(-size // TILE_COMPONENTS)
    for step in range(n_steps):
        _round(size, float32s(x + 4 * step * size), bfloat16s(rounded + step * n * TILE_BYTES))
    for panel in range(n_panels):
        its_weight, its_bias = weight + panel * n * TILE_COMPONENTS * 2 * PANEL, bias + panel * _PANEL_BYTES
        out = gates_x + panel * _GROUP_PANEL_BYTES
        multiply_tiles(n_steps, n, rounded, n * TILE_BYTES, its_weight, its_bias, 0, out, _PANEL_BYTES)


@inner
def _gates(n_rows, at, n_cells, gates, slots, c, m, m_stride, clip, zeros):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Make the cells' outputs m, in bfloat16, of the gates (R, 64) of the cells from `at`."""
    for row in range(n_rows):
        its_gates, its_m = float32s(gates + row * _PANEL_BYTES), bfloat16s(m + row * m_stride + 2 * at)
        its_c = float32s(c + 4 * (int64s(slots)[row] * n_cells + at))
        if n_cells - at >= PANEL_CELLS:  # a number that is known when this is compiled
            lstm_block(PANEL_CELLS, its_gates, PANEL_CELLS, float32s(zeros), PANEL_CELLS, its_c, its_m, clip)
        else:
            lstm_block(n_cells - at, its_gates, PANEL_CELLS, float32s(zeros), PANEL_CELLS, its_c, its_m, clip)


@inner
def _clear_fresh(n_rows, size, n_cells, fresh, h, h_stride, slots, c):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Set the state of rows that begin to 0."""
    for row in range(n_rows):
        if flags(fresh)[row]:
            clear_block(size, bfloat16s(h + row * h_stride))
            clear_block(n_cells, float32s(c + 4 * int64s(slots)[row] * n_cells))


@inner
def _give(n_rows, size, y, y_stride, m, m_stride, projected, bound, outputs):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Write the outputs (R, P) of the clipped projections y, or of the cells' outputs m."""
    for row in range(n_rows):
        its_y = float32s(y + row * y_stride)
        if projected:
            clip_block(size, its_y, bound)
        else:
            for k in range(size):
                its_y[k] = load(bfloat16s(m + row * m_stride), k)
        copy_block(size, its_y, float32s(outputs + 4 * row * size))


@inner
def _run_group(cell, first, n_group, scratch):  # type: ignore[no-untyped-def]
    """All ticks of the rows from `first` on, at most so many."""
    n_ticks, sizes, x, slots, c, fresh, h_state, outputs, size = carray(cell, _N_CELL)[:9]
    n_cells, recurrent, projection, weight_x, bias, clips, configuration, zeros = carray(cell, _N_CELL)[9:]
    n_panels, n_h, n_m = -(-n_cells // PANEL_CELLS), -(-size // TILE_COMPONENTS), -(-n_cells // TILE_COMPONENTS)
    h_stride, m_stride, y_stride = n_h * TILE_BYTES, n_m * TILE_BYTES, -(-size // PANEL) * _PANEL_BYTES
    h, m = scratch, scratch + MAX_TILED_GROUP * h_stride
    y, gates = m + MAX_TILED_GROUP * m_stride, m + MAX_TILED_GROUP * (m_stride + y_stride)
    rounded = gates + _GROUP_PANEL_BYTES
    gates_x = rounded + MAX_TILED_GROUP * h_stride
    n_rows, its_slots = min(n_group, int64s(sizes)[0] - first), slots + 8 * first
    open_tiles(configuration)
    _clear_ends(MAX_TILED_GROUP, size, h, h_stride)
    _clear_ends(MAX_TILED_GROUP, size, rounded, h_stride)
    _clear_ends(MAX_TILED_GROUP, n_cells, m, m_stride)
    for row in range(n_rows):
        _round(size, float32s(h_state + 4 * int64s(its_slots)[row] * size), bfloat16s(h + row * h_stride))
    step, projected_step, projected_end = first, 0, 0
    for tick in range(n_ticks):
        n = min(n_rows, int64s(sizes)[tick] - first)
        if n <= 0:
            break
        if tick == projected_end:
            n_steps, projected_end = n_projected(tick, n_ticks, int64s(sizes), first, n, MAX_TILED_GROUP)
            _project(n_steps, size, n_panels, x + 4 * step * size, rounded, weight_x, bias, gates_x)
            projected_step = step
        _clear_fresh(n, size, n_cells, fresh + step, h, h_stride, its_slots, c)
        for i in range(n_panels):
            panel = n_panels - 1 - i if tick % 2 else i  # back and forth: the cache still has what was read last
            its_weight = recurrent + panel * n_h * TILE_COMPONENTS * 2 * PANEL
            begin = gates_x + panel * _GROUP_PANEL_BYTES + (step - projected_step) * _PANEL_BYTES
            multiply_tiles(n, n_h, h, h_stride, its_weight, begin, _PANEL_BYTES, gates, _PANEL_BYTES)
            _gates(n, panel * PANEL_CELLS, n_cells, gates, its_slots, c, m, m_stride, float32s(clips)[0], zeros)
        if projection != 0:
            for panel in range(-(-size // PANEL)):
                its_weight, its_y = projection + panel * n_m * TILE_COMPONENTS * 2 * PANEL, y + panel * _PANEL_BYTES
                multiply_tiles(n, n_m, m, m_stride, its_weight, zeros, 0, its_y, y_stride)
        its_outputs = outputs + 4 * step * size
        _give(n, size, y, y_stride, m, m_stride, projection != 0, float32s(clips)[1], its_outputs)
        n_next = min(n, int64s(sizes)[tick + 1] - first) if tick + 1 < n_ticks else 0
        for row in range(n):
            its_y = float32s(y + row * y_stride)
            _round(size, its_y, bfloat16s(h + row * h_stride))
            if row >= n_next:  # its last tick
                copy_block(size, its_y, float32s(h_state + 4 * int64s(its_slots)[row] * size))
        step += int64s(sizes)[tick]
    close_tiles()


# ---- kernels, as in `cell_kernel` ------------------------------------------------------------------------------------


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


_KERNEL = types.void(types.CPointer(types.int64))
openmp()  # makes the thread's number known before a kernel is compiled
KERNELS = Kernels(
    *(
        compiled(_KERNEL, {}, function, numba_blocks, cells, panels, tiles, jobs, cell_kernel)
        for function in (_run_in_team, _run_with_helper, _help)
    )
)
