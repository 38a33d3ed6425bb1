"""The same as `steps.TorchSteps`, each step one Triton kernel.

All arithmetic is in float32, whatever the formats in memory. Where the gates are float32, their functions are within a
few units in the last place; in bfloat16 they are the processor's tanh, whose error is below that of the format.

A kernel is compiled once for each format and number of slices, not for each bucket: other numbers that differ from
bucket to bucket are ordinary arguments, for which Triton is told not to specialize.

Legend: see `steps`. A program computes one row's block of cells or components.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilm_model.config import Residual
from bilm_model.engine.cuda.schedule import FRESH, N_COLUMNS, PLACES, Schedule

_BLOCK = 256
"""Cells of a program: for one warp, 16 bytes of bfloat16 a thread, the widest access there is."""


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


@triton.jit(do_not_specialize=["column", "n_bucket", "n_slices", "n_slots"])
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
    """One step of the cells of the rows that run; see `Steps.gates`."""
    row, part, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    direction, piece = part // n_slices, part % n_slices
    tick = tl.load(clock)
    if row + part + block == 0:
        tl.store(clock + 1, tick)
    step = tl.load(begins + tick) + row
    if step < tl.load(begins + tick + 1):
        slot = tl.load(slots + row)
        of_slice = block * BLOCK + tl.arange(0, BLOCK)
        mask = of_slice < n_slice_cells
        cell = piece * n_slice_cells + of_slice
        from_h = gates_h + (direction * n_bucket + row) * 4 * n_cells + cell
        from_x = gates_x + tl.load(steps + step * N_COLUMNS + column + direction) * 4 * n_cells + cell
        # Of a fresh step, 0 stands for what the step before left
        old = of_slice < n_slice_cells * (1 - tl.load(steps + step * N_COLUMNS + FRESH))
        h_i, h_j = tl.load(from_h, old, other=0.0), tl.load(from_h + n_cells, old, other=0.0)
        h_f, h_o = tl.load(from_h + 2 * n_cells, old, other=0.0), tl.load(from_h + 3 * n_cells, old, other=0.0)
        i = h_i.to(tl.float32) + tl.load(from_x, mask).to(tl.float32)
        j = h_j.to(tl.float32) + tl.load(from_x + n_cells, mask).to(tl.float32)
        f = h_f.to(tl.float32) + tl.load(from_x + 2 * n_cells, mask).to(tl.float32)
        o = h_o.to(tl.float32) + tl.load(from_x + 3 * n_cells, mask).to(tl.float32)
        cells = c + (direction * n_slots + slot) * n_cells + cell
        before = tl.load(cells, old, other=0.0)
        state = _clip(_sigmoid(f, EXACT) * before + _sigmoid(i, EXACT) * _tanh(j, EXACT), clip)
        tl.store(cells, state, mask)
        out = m + (part * n_bucket + row) * n_slice_cells + of_slice
        tl.store(out, (_sigmoid(o, EXACT) * _tanh(state, EXACT)).to(m.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["adds", "returns_sum", "n_bucket", "n_slots", "n_rows", "n_steps", "n_places"])
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


class TritonSteps:
    """See `steps.Steps`. All tensors are contiguous."""

    name = f"Triton {triton.__version__} kernels"
    path = "triton"

    def __init__(self, *, hardware_tanh: bool = True) -> None:
        """Set whether gates in formats other than float32 are computed by the processor's tanh."""
        self._hardware_tanh = hardware_tanh

    def gates(
        self, schedule: Schedule, column: int, gates_h: Tensor, gates_x: Tensor, c: Tensor, *, clip: float, m: Tensor
    ) -> None:
        """See `Steps`."""
        (_, n_slots, n_cells), (n_parts, n_bucket, n_slice_cells) = c.shape, m.shape
        gates_kernel[(n_bucket, n_parts, triton.cdiv(n_slice_cells, _BLOCK))](
            *_of(schedule),
            *(gates_h, gates_x, c, m, clip),
            *(column, n_bucket, n_parts // 2, n_slots, n_cells, n_slice_cells),
            FRESH=FRESH,
            N_COLUMNS=N_COLUMNS,
            BLOCK=_BLOCK,
            EXACT=not self._hardware_tanh or gates_h.dtype == torch.float32,
            num_warps=1,
            enable_fp_fusion=True,
        )

    def outputs(
        self,
        schedule: Schedule,
        parts: Tensor,
        *,
        clip: float,
        residual: Residual,
        h: Tensor,
        h_next: Tensor,
        x: Tensor,
        outputs: Tensor,
    ) -> None:
        """See `Steps`."""
        n_parts, n_bucket, n_components = parts.shape
        outputs_kernel[(n_bucket, 2, triton.cdiv(n_components, _BLOCK))](
            *_of(schedule),
            *(parts, h, h_next, x, outputs, clip),
            *(int(residual != "none"), int(residual == "published"), n_bucket),
            *(h.shape[1], h_next.shape[1], x.shape[1], outputs.shape[1], n_components),
            N_SLICES=n_parts // 2,
            PLACES=PLACES,
            N_COLUMNS=N_COLUMNS,
            BLOCK=_BLOCK,
            num_warps=1,
            enable_fp_fusion=True,
        )


def _of(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return schedule.clock, schedule.begins, schedule.slots, schedule.steps
