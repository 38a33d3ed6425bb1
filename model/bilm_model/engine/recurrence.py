"""A cell's recurrence in one kernel, all ticks of a round: for few rows of a small model, in float32.

There the products take less time than starting them does: one sentence through the model that ships spent nine tenths
of its 9 ms in calls. The kernel adds up in the order that oneDNN's products do, found out by trying, so a sentence
has the same bits alone as in a crowd; where it can't be found out, the kernel isn't used.

Legend: R rows, N steps of the round, P projection, C cells, K components of a product's input.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from bilm_model.engine.fused import CONTRACT, clip_block, copy_block, float32s, int64s, kernel, lstm_block
from bilm_model.engine.packed import PackedProduct, padded_rows
from bilm_model.lstm import ClippedProjectedLstm

_MAX_STEP = 2**20
"""Multiply-adds of a tick up to which this is faster than products by themselves."""

_UNROLLED = 8


@njit(fastmath=CONTRACT)
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


@njit(fastmath=CONTRACT)
def _multiply(n_in, n_out, block, x, weight, out, part):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Out (n_out) = x (n_in)·weight: sums of `block` components each, added up."""
    for i in range(n_out):
        out[i] = np.float32(0.0)
    _add_products(0, min(block, n_in), n_out, x, weight, out)
    for first in range(block, n_in, block):
        for i in range(n_out):
            part[i] = np.float32(0.0)
        _add_products(first, min(first + block, n_in), n_out, x, weight, part)
        for i in range(n_out):
            out[i] = out[i] + part[i]


@kernel
def _product(arguments):  # type: ignore[no-untyped-def]
    n_in, n_out, block, x, weight, out, part = carray(arguments, 7)
    _multiply(n_in, n_out, block, float32s(x), float32s(weight), float32s(out), float32s(part))


@kernel
def _recurrence(arguments):  # type: ignore[no-untyped-def]
    n_ticks, sizes, size, n_cells, h_block, m_block, gates_x, index, slots, c = carray(arguments, 18)[:10]
    h, outputs, recurrent, projection, gates_h, m, part, clips = carray(arguments, 18)[10:]
    n_gates, step = 4 * n_cells, 0
    for tick in range(n_ticks):
        for row in range(int64s(sizes)[tick]):
            its_h, its_output = float32s(h + row * size * 4), float32s(outputs + step * size * 4)
            _multiply(size, n_gates, h_block, its_h, float32s(recurrent), float32s(gates_h), float32s(part))
            its_gates_x = float32s(gates_x + int64s(index)[step] * n_gates * 4)
            its_c = float32s(c + int64s(slots)[row] * n_cells * 4)
            lstm_block(n_cells, float32s(gates_h), its_gates_x, n_cells, its_c, float32s(m), float32s(clips)[0])
            if projection != 0:
                _multiply(n_cells, size, m_block, float32s(m), float32s(projection), its_output, float32s(part))
                clip_block(size, its_output, float32s(clips)[1])
            else:
                copy_block(size, float32s(m), its_output)
            copy_block(size, its_output, its_h)
            step += 1


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
                _call(_product, n_in, n_out, block, *(tensor.data_ptr() for tensor in tensors))
            if torch.equal(found, expected):
                return cls(transposed, block)
        return None


class Recurrence:
    """The cells' ticks, one row after another; bit for bit what products and elementwise arithmetic give."""

    def __init__(self, recurrent: _Weight, projection: _Weight | None, cell_clip: float, proj_clip: float) -> None:
        self._recurrent, self._projection = recurrent, projection
        self._clips = torch.tensor([cell_clip, proj_clip])
        size, n_gates = recurrent.transposed.shape
        self._buffers = [torch.empty(n) for n in (n_gates, n_gates // 4, max(size, n_gates))]
        self._n_cells = n_gates // 4

    @classmethod
    def of(cls, lstm: ClippedProjectedLstm, cell_clip: float, proj_clip: float) -> "Recurrence | None":
        """For a layer; None where it would be slower, or can't give the same bits."""
        if lstm.recurrent.weight.dtype != torch.float32 or _step_size(lstm) > _MAX_STEP:
            return None
        recurrent = _Weight.of(lstm.recurrent.weight)
        projection = None if lstm.projection is None else _Weight.of(lstm.projection.weight)
        if recurrent is None or (projection is None) != (lstm.projection is None):
            return None
        return cls(recurrent, projection, cell_clip, proj_clip)

    @property
    def max_rows(self) -> int:
        """Rows up to which this is faster."""
        weights = [self._recurrent, *filter(None, [self._projection])]
        return _MAX_STEP // sum(weight.transposed.numel() for weight in weights)

    def __call__(
        self, gates_x: Tensor, index: Tensor, h: Tensor, c: Tensor, *, slots: Tensor, sizes: tuple[int, ...]
    ) -> Tensor:
        """All ticks.

        Args:
            gates_x: (any, 4·C) input halves.
            index: (N,) int64, the row of `gates_x` for each step.
            h: (≥ R, P) recurrent outputs, changed in place.
            c: (any, C) cells, changed in place.
            slots: (R,) int64, the row of `c` for each row.
            sizes: rows at each tick.

        Returns:
            (N, P), what all steps give.
        """
        outputs = h.new_empty(len(index), h.shape[1])
        ticks = torch.tensor(sizes)
        weights = (self._recurrent.transposed, None if self._projection is None else self._projection.transposed)
        tensors = (gates_x, index, slots, c, h, outputs, *weights, *self._buffers, self._clips)
        blocks = (self._recurrent.block, 0 if self._projection is None else self._projection.block)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        _call(_recurrence, len(sizes), ticks.data_ptr(), h.shape[1], self._n_cells, *blocks, *addresses)
        return outputs


def _step_size(lstm: ClippedProjectedLstm) -> int:
    """Multiply-adds of a row's tick."""
    return lstm.recurrent.weight.numel() + (0 if lstm.projection is None else lstm.projection.weight.numel())


def _call(compiled: Any, *arguments: int) -> None:
    compiled.ctypes((ctypes.c_int64 * len(arguments))(*arguments))
