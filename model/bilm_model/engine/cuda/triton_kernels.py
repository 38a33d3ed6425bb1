"""The CUDA back end's kernels in Triton; `triton_steps` launches them.

All arithmetic is in float32, whatever the formats in memory. Where EXACT, the gates' functions are within a few units
in the last place; otherwise they are the processor's tanh, whose error is below bfloat16's.

Legend: see `steps`. A program of `cells_kernel` computes a tile of rows and cells, one of the others one row's block of
cells or components.
"""

import triton
import triton.language as tl

_INDICES = ["clock", "begins", "slots", "steps"]
"""Parts of one tensor: where each begins depends on the sizes of the engine, its alignment must not matter."""


_LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to float32
_LOG2_E_REST = tl.constexpr(1.925963033500011e-08)
_LN_2 = tl.constexpr(0.6931471805599453)
_EXP_0 = tl.constexpr(-104.0)
"""The exponential of what is below is 0 in float32."""
_SMALL = tl.constexpr(0.625)
"""Below it, tanh is a polynomial: the quotient of exponentials cancels."""
_TANH_3, _TANH_5 = tl.constexpr(-3.33332819422e-1), tl.constexpr(1.33314422036e-1)
_TANH_7, _TANH_9 = tl.constexpr(-5.37397155531e-2), tl.constexpr(2.06390887954e-2)
_TANH_11 = tl.constexpr(-5.70498872745e-3)
"""tanh(x) ≈ x + x³·P(x²), the coefficients of P as in Cephes (tanhf.c)."""


@triton.jit
def _exp(x):
    """Return exp(x) for x ≤ 0: the processor's 2^t, corrected by what rounding to t took off x·log2(e)."""
    x = tl.where(x < _EXP_0, _EXP_0, x)
    t = x * _LOG2_E
    rest = tl.fma(x, _LOG2_E_REST, tl.fma(x, _LOG2_E, -t))
    y = tl.exp2(t)
    return tl.fma(y, rest * _LN_2, y)


@triton.jit
def _hardware_tanh(x):
    # Relative error 2^-11 at most (PTX ISA)
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        # By the exponential of what is not positive: it can't overflow, and NaN stays NaN
        e = _exp(-tl.abs(x))
        y = tl.div_rn(tl.where(x < 0, e, 1.0), 1.0 + e)
    else:
        y = 0.5 + 0.5 * _hardware_tanh(0.5 * x)
    return y


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    if EXACT:
        size = tl.abs(x)
        small = tl.where(size < _SMALL, x, 0.0)
        z = small * small
        p = tl.fma(tl.fma(tl.fma(tl.fma(z, _TANH_11, _TANH_9), z, _TANH_7), z, _TANH_5), z, _TANH_3)
        e = _exp(-2.0 * size)
        y = tl.div_rn(1.0 - e, 1.0 + e)
        y = tl.where(size < _SMALL, tl.fma(small, z * p, small), tl.where(x < 0, -y, y))
    else:
        y = _hardware_tanh(x)
    return y


@triton.jit
def _clip(x, bound):
    # Comparisons with NaN are false, so it stays: tl.minimum would drop it
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _cells(  # noqa: PLR0917
    h_i, h_j, h_f, h_o, from_x, cells, out, old, mask, n_cells, clip, EXACT: tl.constexpr
):
    """Compute cells and their outputs `out` from what h adds to their gates.

    `from_x` is where what x adds to the input gates begins; the other gates follow after n_cells each. A state that is
    not `old` counts as 0.
    """
    i = h_i + tl.load(from_x, mask).to(tl.float32)
    j = h_j + tl.load(from_x + n_cells, mask).to(tl.float32)
    f = h_f + tl.load(from_x + 2 * n_cells, mask).to(tl.float32)
    o = h_o + tl.load(from_x + 3 * n_cells, mask).to(tl.float32)
    before = tl.load(cells, old, other=0.0)
    state = _clip(_sigmoid(f, EXACT) * before + _sigmoid(i, EXACT) * _tanh(j, EXACT), clip)
    tl.store(cells, state, mask)
    tl.store(out, (_sigmoid(o, EXACT) * _tanh(state, EXACT)).to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["column", "n_bucket", "n_slices", "n_slots"], do_not_specialize_on_alignment=_INDICES)
def gates_kernel(  # noqa: PLR0917
    clock,
    begins,
    slots,
    steps,
    gates_h,
    gates_x,
    c,
    m,
    clip,
    column,
    n_bucket,
    n_slices,
    n_slots,
    n_cells,
    n_slice_cells,
    FRESH: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One step of the cells of the rows that run, behind their recurrent product; see `Steps.cells`."""
    row, part, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    direction, piece = part // n_slices, part % n_slices
    tick = tl.load(clock)
    if row + part + block == 0:
        tl.store(clock + 1, tick)
    step = tl.load(begins + tick) + row
    if step < tl.load(begins + tick + 1):
        of_slice = block * BLOCK + tl.arange(0, BLOCK)
        mask = of_slice < n_slice_cells
        cell = piece * n_slice_cells + of_slice
        from_h = gates_h + (direction * n_bucket + row) * 4 * n_cells + cell
        # Of a fresh step, 0 stands for what the step before left
        old = of_slice < n_slice_cells * (1 - tl.load(steps + step * N_COLUMNS + FRESH))
        h_i, h_j = tl.load(from_h, old, other=0.0), tl.load(from_h + n_cells, old, other=0.0)
        h_f, h_o = tl.load(from_h + 2 * n_cells, old, other=0.0), tl.load(from_h + 3 * n_cells, old, other=0.0)
        from_x = gates_x + tl.load(steps + step * N_COLUMNS + column + direction) * 4 * n_cells + cell
        cells = c + (direction * n_slots + tl.load(slots + row)) * n_cells + cell
        out = m + (part * n_bucket + row) * n_slice_cells + of_slice
        h_i, h_j, h_f, h_o = h_i.to(tl.float32), h_j.to(tl.float32), h_f.to(tl.float32), h_o.to(tl.float32)
        _cells(h_i, h_j, h_f, h_o, from_x, cells, out, old, mask, n_cells, clip, EXACT)


@triton.jit
def _gates_product(  # noqa: PLR0917
    from_h,
    weights,
    old,
    first_cell,
    n_inside,
    n_cells,
    N_COMPONENTS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return what h adds to the four gates of a tile, four of (ROWS, CELLS).

    They are one product of a tile that has the rows of weights of all four gates, one gate after another: an
    instruction of the tensor cores is the faster the wider, and reads the tile of h once.

    `from_h` (ROWS, 1) is where each row of h begins; what is not `old` (ROWS, 1) counts as 0. `weights` is where those
    of the direction, (4·C, P), begin. The tile's cells count from `first_cell`, and the first `n_inside` are wanted.
    """
    column, component = tl.arange(0, 4 * CELLS), tl.arange(0, DEPTH)
    in_tile = column % CELLS
    inside = (in_tile < n_inside)[None, :]
    weight_row = (column // CELLS).to(tl.int64) * n_cells + first_cell + in_tile
    from_h += component[None, :]
    from_w = weights + weight_row[None, :] * N_COMPONENTS + component[:, None]
    gates = tl.full((ROWS, 4 * CELLS), 0.0, tl.float32)
    for first in range(0, N_COMPONENTS, DEPTH):
        if N_COMPONENTS % DEPTH == 0:
            x, w = tl.load(from_h + first, old, other=0.0), tl.load(from_w + first, inside, other=0.0)
        else:
            exists = component < N_COMPONENTS - first
            x = tl.load(from_h + first, old & exists[None, :], other=0.0)
            w = tl.load(from_w + first, inside & exists[:, None], other=0.0)
        gates = tl.dot(x, w, gates, input_precision="ieee")
    # A gate's number is two bits, of which split takes the last axis
    gates = tl.permute(tl.reshape(gates, (ROWS, 2, 2, CELLS)), (0, 3, 1, 2))
    even, odd = tl.split(gates)
    h_i, h_f = tl.split(even)
    h_j, h_o = tl.split(odd)
    return h_i, h_j, h_f, h_o


@triton.jit(
    do_not_specialize=["column", "h_rows", "n_bucket", "n_slices", "n_slots"], do_not_specialize_on_alignment=_INDICES
)
def cells_kernel(  # noqa: PLR0917
    clock,
    begins,
    slots,
    steps,
    h,
    weights,
    gates_x,
    c,
    m,
    clip,
    column,
    h_rows,
    n_bucket,
    n_slices,
    n_slots,
    n_cells,
    n_slice_cells,
    N_COMPONENTS: tl.constexpr,
    FRESH: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One step of the cells of the rows that run, with their recurrent product; see `Steps.cells`.

    Programs are numbered by rows first: those that run at one time share weights. One direction's come behind the
    other's, so that what a direction reads is in the L2 cache once.
    """
    first_row, block, direction = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    tick = tl.load(clock)
    if first_row + block + direction == 0:
        tl.store(clock + 1, tick)
    first_step = tl.load(begins + tick)
    n_running = tl.load(begins + tick + 1) - first_step
    if first_row < n_running:
        row = first_row + tl.arange(0, ROWS)
        step, runs = steps + (first_step + row) * N_COLUMNS, row < n_running
        # A fresh step starts from h = c = 0
        old = (runs & (tl.load(step + FRESH, runs, other=1) == 0))[:, None]
        n_blocks = (n_slice_cells + CELLS - 1) // CELLS
        piece, first_of_slice = block // n_blocks, block % n_blocks * CELLS
        first_cell = piece * n_slice_cells + first_of_slice
        h_i, h_j, h_f, h_o = _gates_product(
            h + (direction * h_rows + row)[:, None] * N_COMPONENTS,
            weights + direction * 4 * n_cells * N_COMPONENTS,
            *(old, first_cell, n_slice_cells - first_of_slice, n_cells, N_COMPONENTS, ROWS, CELLS, DEPTH),
        )
        in_tile = tl.arange(0, CELLS)
        cell, of_slice = (first_cell + in_tile)[None, :], (first_of_slice + in_tile)[None, :]
        inside = of_slice < n_slice_cells
        x_row, slot = tl.load(step + column + direction, runs, other=0), tl.load(slots + row, runs, other=0)
        from_x = gates_x + x_row[:, None] * 4 * n_cells + cell
        cells = c + (direction * n_slots + slot)[:, None] * n_cells + cell
        out = m + ((direction * n_slices + piece) * n_bucket + row)[:, None] * n_slice_cells + of_slice
        mask = runs[:, None] & inside
        _cells(h_i, h_j, h_f, h_o, from_x, cells, out, old & inside, mask, n_cells, clip, EXACT)


@triton.jit(
    do_not_specialize=["adds", "returns_sum", "n_bucket", "n_slots", "n_rows", "n_steps", "n_places"],
    do_not_specialize_on_alignment=_INDICES,
)
def outputs_kernel(  # noqa: PLR0917
    clock,
    begins,
    slots,
    steps,
    parts,
    h,
    h_next,
    x,
    outputs,
    clip,
    adds,
    returns_sum,
    n_bucket,
    n_slots,
    n_rows,
    n_steps,
    n_places,
    n_components,
    N_SLICES: tl.constexpr,
    PLACES: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step's outputs, everywhere that they are needed; see `Steps.outputs`."""
    row, direction, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    tick = tl.load(clock + 1)
    if row + direction + block == 0:
        tl.store(clock, tick + 1)
    step = tl.load(begins + tick) + row
    if step < tl.load(begins + tick + 1):
        component = block * BLOCK + tl.arange(0, BLOCK)
        mask = component < n_components
        y = tl.full((BLOCK,), 0.0, tl.float32)
        for piece in tl.static_range(N_SLICES):
            part = parts + ((direction * N_SLICES + piece) * n_bucket + row) * n_components
            y += tl.load(part + component, mask, other=0.0).to(tl.float32)
        y = _clip(y, clip)
        slot, place = tl.load(slots + row), tl.load(steps + step * N_COLUMNS + PLACES + direction)
        tl.store(h + (direction * n_slots + slot) * n_components + component, y, mask)
        tl.store(h_next + (direction * n_rows + row) * n_components + component, y.to(h_next.dtype.element_ty), mask)
        stream = x + (direction * n_steps + step) * n_components + component
        following = y
        if adds != 0:
            following += tl.load(stream, mask, other=0.0)
        tl.store(stream, following, mask)
        returned = y
        if returns_sum != 0:
            returned = following
        tl.store(outputs + (direction * n_places + place) * n_components + component, returned, mask)
