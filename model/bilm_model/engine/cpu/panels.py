"""Products of few rows inside a kernel: a weight in panels, times as many rows at once as the registers hold.

A panel is 64 columns of a weight, component after component, so that it is read as one stream. The sum of a column is
accumulated in a register, one component after another, whatever the number of rows beside it: so a row has the same
bits in any company.

Legend: R rows, K components of a product's input.
"""

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
import numba
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from bilm_model.kernels.numba_blocks import inner

PANEL = 64
"""Columns of a panel."""
PANEL_CELLS = PANEL // 4
"""Cells whose four gates are a panel."""
ROWS = 6
"""Rows that are multiplied at once."""

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_CONTRACT = ("contract", "nsz")  # as `numba_blocks.CONTRACT`


def packed(weight: Tensor) -> Tensor:
    """Return a weight (out, K) in panels (⌈out / 64⌉, K, 64) of neighbouring columns, filled up with zeros."""
    n_out, n_in = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -n_out % PANEL))
    return padded.view(-1, PANEL, n_in).transpose(1, 2).contiguous()


def packed_gates(weight: Tensor) -> Tensor:
    """Return a weight (4·C, K) in panels (⌈C / 16⌉, K, 64) of the four gates of neighbouring cells."""
    n_in = weight.shape[1]
    gates = weight.detach().view(4, -1, n_in)
    padded = F.pad(gates, (0, 0, 0, -gates.shape[1] % PANEL_CELLS))
    return padded.view(4, -1, PANEL_CELLS, n_in).permute(1, 3, 0, 2).reshape(-1, n_in, PANEL).contiguous()


def processor_features() -> str:
    """Return the features of the processor that kernels are compiled for, in LLVM's names: "+avx2,-avx512f,…"."""
    features = numba.config.CPU_FEATURES
    if features is None:
        named = numba.config.CPU_NAME not in (None, "host")
        features = "" if named else llvm.get_host_cpu_features().flatten()
    return str(features)


def has_512_bit_registers() -> bool:
    """Return whether kernels are compiled for a processor with 32 registers of 512 bits; AVX2 has 16 of 256."""
    return "+avx512f" in processor_features()


def _times_rows(n_rows: int, n_columns: int, n_unrolled: int) -> Any:
    """Return `f(n_in, x, x_stride, panel, out, out_stride, adds)`: out (R, columns) (+)= x (R, K)·panel (K, 64).

    By addresses, with strides in bytes. The accumulators are one vector a row, which LLVM cuts into registers.
    """
    vector = ir.VectorType(_FLOAT, n_columns)
    rows = range(n_rows)

    def spread(builder: Any, number: Any) -> Any:
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, number, _INT32(0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, n_columns), [0] * n_columns))

    def components(builder: Any, bounds: Any, n: int, address: Any, totals: Sequence[Any]) -> tuple[Any, Any]:
        """Accumulate components, n a turn, as long as there are n within bounds; return the first left, and totals."""
        begin, end = bounds
        before = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        component, *sums = (builder.phi(kind) for kind in (_INT64, *(vector for _ in rows)))
        builder.cbranch(builder.icmp_signed("<=", builder.add(component, _INT64(n)), end), body, done)
        builder.position_at_end(body)
        added = list(sums)
        for k in (builder.add(component, _INT64(i)) for i in range(n)):
            weights = builder.load(address("panel", k, vector), align=4)
            for row in rows:
                factor = spread(builder, builder.load(address(row, k, _FLOAT)))
                product = builder.fmul(weights, factor, flags=_CONTRACT)
                added[row] = builder.fadd(added[row], product, flags=_CONTRACT)
        next_component = builder.add(component, _INT64(n))
        for phi, first, again in zip((component, *sums), (begin, *totals), (next_component, *added), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(again, builder.block)
        builder.branch(head)
        builder.position_at_end(done)
        return component, sums

    @intrinsic
    def multiply(typing_context, n_in, x, x_stride, panel, out, out_stride, adds):  # type: ignore[no-untyped-def] # noqa: PLR0917
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            n_in, x, x_stride, panel, out, out_stride, adds = args

            def pointer(base: Any, offset: Any, kind: Any) -> Any:
                return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

            def address(place: Any, k: Any, kind: Any) -> Any:
                if place == "panel":
                    return pointer(panel, builder.mul(k, _INT64(4 * PANEL)), kind)
                return pointer(x, builder.add(builder.mul(x_stride, _INT64(place)), builder.mul(k, _INT64(4))), kind)

            totals = [ir.Constant(vector, [0.0] * n_columns) for _ in rows]
            k, totals = components(builder, (_INT64(0), n_in), n_unrolled, address, totals)
            k, totals = components(builder, (k, n_in), 1, address, totals)
            outs = [pointer(out, builder.mul(out_stride, _INT64(row)), vector) for row in rows]
            with builder.if_else(builder.icmp_signed("!=", adds, _INT64(0))) as (added, stored):
                with added:
                    for total, place in zip(totals, outs, strict=True):
                        whole = builder.fadd(builder.load(place, align=4), total, flags=("nsz",))
                        builder.store(whole, place, align=4)
                with stored:
                    for total, place in zip(totals, outs, strict=True):
                        builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


_WIDE = has_512_bit_registers()
# So many rows at once as the accumulators of a panel leave registers for: 24 of 32, or 12 of 16 for a quarter of it
_QUARTER = PANEL // 4
_AT_ONCE = PANEL if _WIDE else _QUARTER
_six, _five, _four, _three = (_times_rows(n, _AT_ONCE, 2) for n in (6, 5, 4, 3))
_two, _one = _times_rows(2, PANEL if _WIDE else PANEL // 2, 4), _times_rows(1, PANEL, 4)


@inner
def _times_few(n_rows, n_in, x, x_stride, panel, out, out_stride, adds):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Multiply 3 to 6 rows by a part of a panel."""
    if n_rows == 6:
        _six(n_in, x, x_stride, panel, out, out_stride, adds)
    elif n_rows == 5:
        _five(n_in, x, x_stride, panel, out, out_stride, adds)
    elif n_rows == 4:
        _four(n_in, x, x_stride, panel, out, out_stride, adds)
    else:
        _three(n_in, x, x_stride, panel, out, out_stride, adds)


@inner
def _times_one_or_two(n_rows, n_in, x, x_stride, panel, out, out_stride, adds):  # type: ignore[no-untyped-def] # noqa: PLR0917
    if n_rows == 1:
        _one(n_in, x, x_stride, panel, out, out_stride, adds)
    else:
        for part in range(1 if _WIDE else 2):
            at = part * 2 * PANEL
            _two(n_in, x, x_stride, panel + at, out + at, out_stride, adds)


@inner
def multiply_panel(n_rows, n_in, block, x, x_stride, panel, out, out_stride):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Out (R, 64) = x (R, K)·panel (K, 64), sums of `block` components each, added up. Strides are in bytes."""
    rest = n_rows % ROWS if n_rows % ROWS < 3 else 0  # of too few rows to fill the registers by a part of a panel
    n_many = n_rows - rest
    for first in range(0, n_in, block):
        n, its_x, its_panel = min(block, n_in - first), x + 4 * first, panel + 4 * PANEL * first
        for part in range(PANEL // _AT_ONCE):  # which stays in the first-level cache for all rows
            at = part * 4 * _AT_ONCE
            for row in range(0, n_many, ROWS):
                row_x, row_out, n_few = its_x + row * x_stride, out + row * out_stride + at, min(ROWS, n_many - row)
                _times_few(n_few, n, row_x, x_stride, its_panel + at, row_out, out_stride, first)
        if rest > 0:
            rest_x, rest_out = its_x + n_many * x_stride, out + n_many * out_stride
            _times_one_or_two(rest, n, rest_x, x_stride, its_panel, rest_out, out_stride, first)
