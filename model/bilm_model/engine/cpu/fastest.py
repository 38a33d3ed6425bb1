"""The choice of the arithmetic on a CPU: compiled kernels where they work, torch's operators otherwise."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from bilm_model.config import BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.kernels.elementwise import Elementwise, TorchElementwise

if TYPE_CHECKING:
    from bilm_model.engine.cpu.recurrence import Recurrence

_log = logging.getLogger(__name__)

NewRecurrence = Callable[[ClippedProjectedLstm, BilmConfig], "Recurrence | None"]
"""Makes a layer's kernel for all ticks; None where products are faster."""


def fastest_elementwise(dtype: torch.dtype) -> Elementwise:
    """Return the fastest arithmetic between products that works here."""
    try:
        # Not at the top: Numba, or what it needs of the platform, may be missing
        from bilm_model.engine.cpu.fused_elementwise import FusedElementwise  # noqa: PLC0415

        fused = FusedElementwise(dtype)
        _compare(fused, dtype)
    except Exception as error:  # whatever keeps a kernel from being compiled or from computing what it should
        _log.warning("fused kernels unavailable, falling back to torch: %s", error)
        return TorchElementwise()
    return fused


def new_recurrence(lstm: ClippedProjectedLstm, config: BilmConfig) -> "Recurrence | None":
    """Return a layer's kernel for all ticks; None where products are faster.

    Raises:
        Exception: whatever keeps a kernel from being compiled.
    """
    from bilm_model.engine.cpu.recurrence import Recurrence  # noqa: PLC0415 - as above

    return Recurrence.of(lstm, config)


def recurrence_or_none(lstm: ClippedProjectedLstm, config: BilmConfig, new: NewRecurrence) -> "Recurrence | None":
    """Return what `new` makes; None, with a warning, if it fails."""
    try:
        return new(lstm, config)
    except Exception as error:  # whatever keeps a kernel from being compiled
        _log.warning("one kernel for all ticks unavailable, products do the work: %s", error)
        return None


def _compare(fused: Elementwise, dtype: torch.dtype) -> None:
    """Try the kernel that matters most on a few numbers.

    Raises:
        RuntimeError: if it computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    gates_h, gates_x = (torch.randn(3, 4 * 40, generator=generator).to(dtype) for _ in range(2))
    index, fresh = torch.tensor([2, 0, 1]), torch.tensor([False, True, False])
    found, expected = torch.zeros(2, 3, 40, dtype=dtype)
    for elementwise, out in ((fused, found), (TorchElementwise(), expected)):
        elementwise.lstm(gates_h, gates_x, index, torch.ones(3, 40), index, fresh=fresh, clip=3.0, out=out)
    if not torch.allclose(found.float(), expected.float(), atol=1e-2 if dtype == torch.bfloat16 else 1e-5):
        raise RuntimeError("they don't compute what they should")
