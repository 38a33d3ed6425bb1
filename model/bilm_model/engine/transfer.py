"""Between the host and a device, without anybody waiting for anybody."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """An array on a device. The device works on meanwhile: a plain `.to` would wait for all that was asked of it."""
    tensor = torch.from_numpy(array)
    # Torch keeps the pinned memory until the transfer is over, and then for the next one of that size
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A device's tensor on its way to the host, beside what the device does next."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy; a tensor on the CPU is there already. What was asked of the device before comes first."""
        self._host = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host, self._arrived = _start(tensor)

    def done(self) -> bool:
        """Return whether the copy has arrived."""
        return self._arrived is None or self._arrived.query()

    def array(self) -> NDArray[np.generic]:
        """Return the copy; waits for it.

        Raises:
            TypeError: for bfloat16, which numpy doesn't have: copy `tensor.view(torch.int16)`.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        array: NDArray[np.generic] = self._host.numpy()
        return array


def _start(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        # blocking: a thread that waits sleeps, instead of asking again and again
        arrived = torch.cuda.Event(blocking=True)
        arrived.record(stream)
    # The tensor's memory must not be given to others before the copy is over
    tensor.record_stream(stream)
    return host, arrived


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
