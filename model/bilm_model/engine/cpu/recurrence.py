"""A cell's recurrence in one kernel, all ticks of a round: for few rows of a small model, in float32.

There the products take less time than starting them does: one sentence through the model that ships spent nine tenths
of its 9 ms in calls. The kernel adds up in the order that oneDNN's products do, found out by trying, so a sentence
has the same bits alone as in a crowd; where it can't be found out, the kernel isn't used.

Legend: R rows, N steps of the round, P projection, C cells, K components of a product's input.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from bilm_model.config import BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.kernels.elementwise import CellWork
from bilm_model.kernels.numba_blocks import (
    CONTRACT,
    clear_state,
    clip_block,
    copy_block,
    flags,
    float32s,
    inner,
    int64s,
    kernel,
    lstm_block,
    native,
    openmp,
    run,
    share,
)
from bilm_model.kernels.products import PackedProduct, padded_rows

_MAX_STEP = 2**20
"""Multiply-adds of a tick up to which this is faster than products by themselves."""

_UNROLLED = 8


@inner
def _add_products(n_first, n_end, n_out, x, weight, out):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Out (n_out) += x[first..end]·weight[first..end] (K, n_out), one component after another."""
    for k in range(n_first, n_end - _UNROLLED + 1, _UNROLLED):
        for i in range(n_out):
            total = out[i]
            for u in range(_UNROLLED):
                total = total + x[k + u] * weight[(k + u) * n_out + i]
            out[i] = total
    for k in range(n_end - (n_end - n_first) % _UNROLLED, n_end):
        for i in range(n_out):
            out[i] = out[i] + x[k] * weight[k * n_out + i]


def _multiply_by_address(n_in, n_out, block, x, weight, out, part):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Out (n_out) = x (n_in)·weight: sums of `block` components each, added up. By addresses; `part` is for a sum."""
    for first in range(0, n_in, block):
        total = float32s(part if first else out)
        for i in range(n_out):
            total[i] = np.float32(0.0)
        _add_products(first, min(first + block, n_in), n_out, float32s(x), float32s(weight), total)
        if first:
            whole = float32s(out)
            for i in range(n_out):
                whole[i] = whole[i] + total[i]


_multiply = native(types.void(*[types.int64] * 7), _multiply_by_address, fastmath=CONTRACT)
"""Called by its address, by kernels too: so the code whose bits are tried is the one that is used."""


@intrinsic
def _call_multiply(typing_context, address, n_in, n_out, block, x, weight, out, part):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Call `_multiply` at an address: a kernel that knew the address itself couldn't be kept on disk."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 7).as_pointer()
        builder.call(builder.inttoptr(args[0], function), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@inner
def _run_ticks(arguments):  # type: ignore[no-untyped-def]
    n_ticks, sizes, size, n_cells, h_block, m_block, gates_x, index, slots, c = carray(arguments, 20)[:10]
    fresh, h, outputs, recurrent, projection, gates_h, m, part, clips, multiply = carray(arguments, 20)[10:]
    n_gates, step = 4 * n_cells, 0
    for tick in range(n_ticks):
        for row in range(int64s(sizes)[tick]):
            its_h, its_output = float32s(h + row * size * 4), float32s(outputs + step * size * 4)
            its_gates_x = float32s(gates_x + int64s(index)[step] * n_gates * 4)
            its_c = float32s(c + int64s(slots)[row] * n_cells * 4)
            if flags(fresh)[step]:
                clear_state(n_cells, float32s(gates_h), n_cells, its_c)
            else:
                _call_multiply(multiply, size, n_gates, h_block, h + row * size * 4, recurrent, gates_h, part)
            lstm_block(
                n_cells, float32s(gates_h), n_cells, its_gates_x, n_cells, its_c, float32s(m), float32s(clips)[0]
            )
            if projection != 0:
                _call_multiply(multiply, n_cells, size, m_block, m, projection, outputs + step * size * 4, part)
                clip_block(size, its_output, float32s(clips)[1])
            else:
                copy_block(size, float32s(m), its_output)
            copy_block(size, its_output, its_h)
            step += 1


@kernel
def _recurrences(arguments):  # type: ignore[no-untyped-def]
    n_threads, n_jobs = carray(arguments, 2)
    first, end = share(n_jobs, n_threads)
    for job in range(first, end):
        _run_ticks(int64s(carray(arguments, 2 + n_jobs)[2 + job]))


@dataclass(frozen=True, eq=False)
class _Weight:
    """A product's weight as the kernel reads it.

    Attributes:
        transposed: (K, out).
        block: components that are added up by themselves.
    """

    transposed: Tensor
    block: int

    @classmethod
    def of(cls, weight: Tensor) -> "_Weight | None":
        """Weight (out, K); None if the order of oneDNN's sums can't be found out."""
        n_out, n_in = weight.shape
        transposed = weight.detach().t().contiguous()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(padded_rows(3), n_in, generator=generator)
        expected = PackedProduct(weight)(x)
        for block in (n_in, 1024, 512, 256, 128, 64):
            found = torch.empty_like(expected)
            part = torch.empty(n_out)
            for row, out in zip(x, found, strict=True):
                tensors = (row, transposed, out, part)
                _multiply.ctypes(n_in, n_out, block, *(tensor.data_ptr() for tensor in tensors))
            if torch.equal(found, expected):
                return cls(transposed, block)
        return None


class Recurrence:
    """A cell's ticks, one row after another; bit for bit what products and elementwise arithmetic give."""

    def __init__(self, recurrent: _Weight, projection: _Weight | None, config: BilmConfig) -> None:
        self._recurrent, self._projection, self._config = recurrent, projection, config
        self._clips = torch.tensor([config.cell_clip, config.proj_clip])
        n_gates = 4 * config.cell_dim
        self._buffers = [torch.empty(n) for n in (n_gates, config.cell_dim, n_gates)]

    @classmethod
    def of(cls, lstm: ClippedProjectedLstm, config: BilmConfig) -> "Recurrence | None":
        """For a layer; None where it would be slower, or can't give the same bits."""
        if lstm.recurrent.weight.dtype != torch.float32 or step_size(config) > _MAX_STEP:
            return None
        recurrent = _Weight.of(lstm.recurrent.weight)
        projection = None if lstm.projection is None else _Weight.of(lstm.projection.weight)
        if recurrent is None or (projection is None) != (lstm.projection is None):
            return None
        return cls(recurrent, projection, config)

    def takes(self, n_rows: int) -> bool:
        """Return whether this is faster for so many rows."""
        return n_rows * step_size(self._config) <= _MAX_STEP

    def arguments(self, work: CellWork, outputs: Tensor, ticks: Tensor) -> "ctypes.Array[ctypes.c_int64]":
        """Of the kernel, for outputs (N, P) and the rows at each tick."""
        weights = (self._recurrent.transposed, None if self._projection is None else self._projection.transposed)
        steps = (work.gates_x, work.index, work.slots, work.c, work.fresh)
        tensors = (*steps, work.h, outputs, *weights, *self._buffers, self._clips)
        blocks = (self._recurrent.block, 0 if self._projection is None else self._projection.block)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        numbers = (len(ticks), ticks.data_ptr(), self._config.projection_dim, self._config.cell_dim, *blocks)
        return _array(*numbers, *addresses, _multiply.address)


def run_together(cells: Sequence[tuple[Recurrence, CellWork]]) -> list[Tensor]:
    """Run different cells, each on a thread if there are enough; return what each gives, (N, P)."""
    outputs = [work.h.new_empty(len(work.index), work.h.shape[1]) for _, work in cells]
    ticks = [torch.tensor(work.sizes) for _, work in cells]
    jobs = [cell.arguments(work, out, n) for (cell, work), out, n in zip(cells, outputs, ticks, strict=True)]
    n_numbers = sum(out.numel() for out in outputs)
    run(_recurrences, n_numbers, len(jobs), *(ctypes.addressof(job) for job in jobs), parallel=openmp())
    return outputs


def step_size(config: BilmConfig) -> int:
    """Multiply-adds of a row's tick."""
    return config.projection_dim * config.cell_dim * (5 if config.has_lstm_projection else 4)


def _array(*numbers: int) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(numbers))(*numbers)
