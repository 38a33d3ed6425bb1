"""A training cell's arithmetic as fused kernels that Numba compiles: each number is read and written once.

Legend: B streams, C cells. Gates stand in the order input, candidate, forget, output.
"""

import ctypes

from bilm_model.kernels.numba_blocks import (
    BLOCK,
    HALF,
    TWO,
    Kernel,
    float32s,
    inner,
    kernel,
    load,
    openmp,
    run,
    share,
    store,
    tanh_ratio,
)
from numba import carray
from torch import Tensor

openmp()  # makes the thread's number known before a kernel is compiled


@inner
def _sigmoid(x):  # type: ignore[no-untyped-def]
    p, q = tanh_ratio(HALF * x)
    return (q + p) / (TWO * q)


@inner
def _forward_block(n, n_cells, gates, recurrent, c_before, c, m, clip):  # type: ignore[no-untyped-def] # noqa: PLR0917
    for k in range(n):
        i = _sigmoid(load(gates, k) + load(recurrent, k))
        p, q = tanh_ratio(load(gates, k + n_cells) + load(recurrent, k + n_cells))
        j = p / q
        f = _sigmoid(load(gates, k + 2 * n_cells) + load(recurrent, k + 2 * n_cells))
        o = _sigmoid(load(gates, k + 3 * n_cells) + load(recurrent, k + 3 * n_cells))
        cell = f * load(c_before, k) + i * j
        cell = clip if cell > clip else cell
        cell = -clip if cell < -clip else cell
        p, q = tanh_ratio(cell)
        store(gates, k, i)
        store(gates, k + n_cells, j)
        store(gates, k + 2 * n_cells, f)
        store(gates, k + 3 * n_cells, o)
        store(c, k, cell)
        store(m, k, o * p / q)


@inner
def _backward_block(n, n_cells, gates, c_before, c, dm, dc, clip):  # type: ignore[no-untyped-def] # noqa: PLR0917
    one = TWO * HALF
    for k in range(n):
        i, j = load(gates, k), load(gates, k + n_cells)
        f, o = load(gates, k + 2 * n_cells), load(gates, k + 3 * n_cells)
        cell, d_m = load(c, k), load(dm, k)
        p, q = tanh_ratio(cell)
        t = p / q
        d = load(dc, k) + d_m * o * (one - t * t)
        d = d if -clip < cell < clip else one - one
        store(gates, k, d * j * i * (one - i))
        store(gates, k + n_cells, d * i * (one - j * j))
        store(gates, k + 2 * n_cells, d * load(c_before, k) * f * (one - f))
        store(gates, k + 3 * n_cells, d_m * t * o * (one - o))
        store(dc, k, d * f)


@kernel
def _forward(arguments):  # type: ignore[no-untyped-def]
    n_threads, n_rows, n_cells, block, gates, recurrent, c_before, c, m = carray(arguments, 9)
    clip = float32s(arguments[9])[0]
    n_blocks = (n_cells + block - 1) // block
    first, end = share(n_rows * n_blocks, n_threads)
    for unit in range(first, end):
        row, k = unit // n_blocks, unit % n_blocks * block
        gate_at, at = (row * 4 * n_cells + k) * 4, (row * n_cells + k) * 4
        _forward_block(
            min(block, n_cells - k),
            n_cells,
            float32s(gates + gate_at),
            float32s(recurrent + gate_at),
            float32s(c_before + at),
            float32s(c + at),
            float32s(m + at),
            clip,
        )


@kernel
def _backward(arguments):  # type: ignore[no-untyped-def]
    n_threads, n_rows, n_cells, block, gates, c_before, c, dm, dc = carray(arguments, 9)
    clip = float32s(arguments[9])[0]
    n_blocks = (n_cells + block - 1) // block
    first, end = share(n_rows * n_blocks, n_threads)
    for unit in range(first, end):
        row, k = unit // n_blocks, unit % n_blocks * block
        at = (row * n_cells + k) * 4
        _backward_block(
            min(block, n_cells - k),
            n_cells,
            float32s(gates + (row * 4 * n_cells + k) * 4),
            float32s(c_before + at),
            float32s(c + at),
            float32s(dm + at),
            float32s(dc + at),
            clip,
        )


class FusedCell:
    """See `cells.CellArithmetic`; in float32 on a CPU."""

    def forward(self, gates: Tensor, recurrent: Tensor, c_before: Tensor, c: Tensor, m: Tensor, *, clip: float) -> None:
        """See `CellArithmetic`."""
        _call(_forward, (gates, recurrent, c_before, c, m), clip)

    def backward(self, gates: Tensor, c_before: Tensor, c: Tensor, dm: Tensor, dc: Tensor, *, clip: float) -> None:
        """See `CellArithmetic`."""
        _call(_backward, (gates, c_before, c, dm, dc), clip)


def _call(compiled: Kernel, tensors: tuple[Tensor, ...], clip: float) -> None:
    n_rows, n_cells = tensors[2].shape
    bound = ctypes.c_float(clip)
    addresses = [tensor.data_ptr() for tensor in tensors]
    numbers = (n_rows, n_cells, BLOCK, *addresses, ctypes.addressof(bound))
    run(compiled, n_rows * n_cells, *numbers, parallel=openmp())
