"""The choice of the arithmetic between a tick's products."""

import logging

import torch

from bilm_model.engine.cuda.steps import Steps, TorchSteps, check_steps

_log = logging.getLogger(__name__)


def fastest_steps(device: torch.device) -> Steps:
    """Return the fastest arithmetic that works on a device."""
    if device.type != "cuda":
        return TorchSteps()
    try:
        # Not at the top: Triton, or the C compiler that it needs at run time, may be missing
        from bilm_model.engine.cuda.triton_steps import TritonSteps  # noqa: PLC0415

        steps = TritonSteps()
        check_steps(steps, device)
    except Exception as error:  # whatever keeps a kernel from being compiled or from computing what it should
        _log.warning("Triton kernels unavailable, falling back to torch: %s", error)
        return TorchSteps()
    return steps
