"""A cell's arithmetic between its products, forward and backward: plainly in torch, or as fused kernels on a CPU.

Legend: B streams, C cells. Gates stand in the order input, candidate, forget, output.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from bilm_model.kernels.fallbacks import note_fallback
from torch import Tensor


class CellArithmetic(Protocol):
    """One tick of a cell, for all streams. Every tensor is contiguous and written in place where it says so."""

    def forward(self, gates: Tensor, recurrent: Tensor, c_before: Tensor, c: Tensor, m: Tensor, *, clip: float) -> None:
        """Compute the cells and what they put out.

        Args:
            gates: (B, 4·C) the input projections; becomes the gates, activated.
            recurrent: (B, 4·C) the recurrent half.
            c_before: (B, C) cells before the tick.
            c: (B, C) receives the cells after it, clipped.
            m: (B, C) receives σ(o)·tanh(c).
            clip: bound of the cells.
        """

    def backward(self, gates: Tensor, c_before: Tensor, c: Tensor, dm: Tensor, dc: Tensor, *, clip: float) -> None:
        """Compute the gradients.

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


def _new_fused() -> CellArithmetic:
    # Not at the top: Numba may be missing, is not needed on a GPU, and takes a second to compile the kernels
    from bilm_training.network.fused_cells import FusedCell  # noqa: PLC0415

    return FusedCell()


@functools.cache
def cell_arithmetic(
    device_type: str, dtype: torch.dtype, new_fused: Callable[[], CellArithmetic] = _new_fused
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
        note_fallback("training", "fused kernels unavailable, training falls back to torch and is slower", error)
        return TorchCell()
    return fused


def _compare(fused: CellArithmetic) -> None:
    """Try one tick forward and backward on a few numbers.

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
