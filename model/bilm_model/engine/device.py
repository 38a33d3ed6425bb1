"""Which device to run on."""

import torch

from bilm_model.errors import ModelError


def resolve_device(name: str) -> torch.device:
    """The device that a user names.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto": the first CUDA device where there is one, else the CPU.

    Raises:
        ModelError: if there is no such device here.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda:0" if available else "cpu"
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ModelError(
            f"device {name}: this machine has {available} CUDA devices that torch {torch.__version__} sees"
        )
    return device
