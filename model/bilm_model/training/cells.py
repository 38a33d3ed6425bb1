"""A cell's arithmetic between its products, forward and backward: plainly in torch, or as fused kernels on a CPU.

Legend: B streams, C cells. Gates stand in the order input, candidate, forget, output.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_BLOCK = 512


class CellArithmetic(Protocol):
    """One tick of a cell, for all streams. Every tensor is contiguous and written in place where it says so."""

    def forward(self, gates: Tensor, recurrent: Tensor, c_before: Tensor, c: Tensor, m: Tensor, *, clip: float) -> None:
        """Computes the cells and what they put out.

        Args:
            gates: (B, 4·C) the inputs' half; becomes the gates, activated.
            recurrent: (B, 4·C) the recurrent half.
            c_before: (B, C) cells before the tick.
            c: (B, C) receives the cells after it, clipped.
            m: (B, C) receives σ(o)·tanh(c).
            clip: bound of the cells.
        """

    def backward(self, gates: Tensor, c_before: Tensor, c: Tensor, dm: Tensor, dc: Tensor, *, clip: float) -> None:
        """Computes the gradients.

        Args:
            gates: (B, 4·C) as `forward` left them; become the gradient by the gates before activation.
            c_before: (B, C) as in `forward`.
            c: (B, C) as `forward` left it. No gradient passes a cell that was clipped.
            dm: (B, C) gradient by m.
            dc: (B, C) gradient by c from later ticks; becomes the gradient by c_before.
            clip: bound of the cells.
        """


class TorchCell:
    """In torch's own operators: on any device, in any format."""

    def forward(self, gates: Tensor, recurrent: Tensor, c_before: Tensor, c: Tensor, m: Tensor, *, clip: float) -> None:
        """See `CellArithmetic`."""
        i, j, f, o = gates.add_(recurrent).chunk(4, dim=-1)
        for gate in (i, f, o):
            gate.sigmoid_()
        j.tanh_()
        torch.mul(f, c_before, out=c).addcmul_(i, j).clamp_(-clip, clip)
        torch.tanh(c, out=m).mul_(o)

    def backward(self, gates: Tensor, c_before: Tensor, c: Tensor, dm: Tensor, dc: Tensor, *, clip: float) -> None:
        """See `CellArithmetic`."""
        i, j, f, o = gates.chunk(4, dim=-1)
        t = torch.tanh(c)
        dc.addcmul_(dm * o, 1 - t * t).mul_(c.abs() < clip)
        d_gates = (dc * j * i * (1 - i), dc * i * (1 - j * j), dc * c_before * f * (1 - f), dm * t * o * (1 - o))
        dc.mul_(f)
        for gate, d_gate in zip((i, j, f, o), d_gates, strict=True):
            gate.copy_(d_gate)


class FusedCell:
    """By kernels that Numba compiles, in float32 on a CPU: each number is read and written once."""

    def __init__(self) -> None:
        """Compiles the kernels (once in a process); takes a second.

        Raises:
            ImportError: without Numba.
        """
        self._forward, self._backward, self._run = _compile()

    def forward(self, gates: Tensor, recurrent: Tensor, c_before: Tensor, c: Tensor, m: Tensor, *, clip: float) -> None:
        """See `CellArithmetic`."""
        self._call(self._forward, (gates, recurrent, c_before, c, m), clip)

    def backward(self, gates: Tensor, c_before: Tensor, c: Tensor, dm: Tensor, dc: Tensor, *, clip: float) -> None:
        """See `CellArithmetic`."""
        self._call(self._backward, (gates, c_before, c, dm, dc), clip)

    def _call(self, kernel: Any, tensors: tuple[Tensor, ...], clip: float) -> None:
        n_rows, n_cells = tensors[2].shape
        bound = ctypes.c_float(clip)
        addresses = [tensor.data_ptr() for tensor in tensors]
        self._run(kernel, n_rows * n_cells, n_rows, n_cells, _BLOCK, *addresses, ctypes.addressof(bound))


@functools.cache
def cell_arithmetic(
    device_type: str, dtype: torch.dtype, new_fused: Callable[[], CellArithmetic] = FusedCell
) -> CellArithmetic:
    """Return the fastest arithmetic that works for tensors of this kind.

    Args:
        device_type: "cpu" or "cuda".
        dtype: of the tensors.
        new_fused: makes the arithmetic that is tried first.
    """
    if device_type != "cpu" or dtype != torch.float32:
        return TorchCell()
    try:
        fused = new_fused()
        _compare(fused)
    except Exception as error:  # whatever keeps a kernel from being compiled or from computing what it should
        _log.warning("fused kernels unavailable, training falls back to torch and is slower: %s", error)
        return TorchCell()
    return fused


def _compare(fused: CellArithmetic) -> None:
    """Try a tick forward and backward on a few numbers.

    Raises:
        RuntimeError: if it gives other numbers than torch does.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, width, generator=generator) for width in (160, 160, 40, 40, 40)]
    made = []
    for cell in (fused, TorchCell()):
        gates, recurrent, c_before, dm, dc = (tensor.clone() for tensor in drawn)
        c, m = torch.empty_like(c_before), torch.empty_like(c_before)
        cell.forward(gates, recurrent, c_before, c, m, clip=1.0)
        cell.backward(gates, c_before, c, dm, dc, clip=1.0)
        made.append(torch.cat([gates, c, m, dc], dim=1))
    found, expected = made
    if not torch.allclose(found, expected, atol=1e-5):
        raise RuntimeError("they don't compute what they should")


@functools.cache
def _compile() -> tuple[Any, Any, Callable[..., None]]:  # noqa: PLR0915 - kernels see what stands around them
    from numba import carray  # noqa: PLC0415 - heavy, and not needed on a GPU

    from bilm_model.engine.fused import (  # noqa: PLC0415
        HALF,
        TWO,
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

    openmp()

    @inner
    def sigmoid(x):  # type: ignore[no-untyped-def]
        p, q = tanh_ratio(HALF * x)
        return (q + p) / (TWO * q)

    @inner
    def forward_block(n, n_cells, gates, recurrent, c_before, c, m, clip):  # type: ignore[no-untyped-def] # noqa: PLR0917
        for k in range(n):
            i = sigmoid(load(gates, k) + load(recurrent, k))
            p, q = tanh_ratio(load(gates, k + n_cells) + load(recurrent, k + n_cells))
            j = p / q
            f = sigmoid(load(gates, k + 2 * n_cells) + load(recurrent, k + 2 * n_cells))
            o = sigmoid(load(gates, k + 3 * n_cells) + load(recurrent, k + 3 * n_cells))
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
    def backward_block(n, n_cells, gates, c_before, c, dm, dc, clip):  # type: ignore[no-untyped-def] # noqa: PLR0917
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
    def forward(arguments):  # type: ignore[no-untyped-def]
        n_threads, n_rows, n_cells, block, gates, recurrent, c_before, c, m = carray(arguments, 9)
        clip = float32s(arguments[9])[0]
        n_blocks = (n_cells + block - 1) // block
        first, end = share(n_rows * n_blocks, n_threads)
        for unit in range(first, end):
            row, k = unit // n_blocks, unit % n_blocks * block
            gate_at, at = (row * 4 * n_cells + k) * 4, (row * n_cells + k) * 4
            forward_block(
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
    def backward(arguments):  # type: ignore[no-untyped-def]
        n_threads, n_rows, n_cells, block, gates, c_before, c, dm, dc = carray(arguments, 9)
        clip = float32s(arguments[9])[0]
        n_blocks = (n_cells + block - 1) // block
        first, end = share(n_rows * n_blocks, n_threads)
        for unit in range(first, end):
            row, k = unit // n_blocks, unit % n_blocks * block
            at = (row * n_cells + k) * 4
            backward_block(
                min(block, n_cells - k),
                n_cells,
                float32s(gates + (row * 4 * n_cells + k) * 4),
                float32s(c_before + at),
                float32s(c + at),
                float32s(dm + at),
                float32s(dc + at),
                clip,
            )

    return forward, backward, run
