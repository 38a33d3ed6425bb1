"""Between the host and a device: what a round sends and what comes back, without anybody waiting for anybody.

A device copies beside its other work only from and to pinned memory. Torch rounds pinned memory up to a power of two
and doesn't return it, so it is allocated once and used in turns (here and in `host_ring`).
"""

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]

SPIN_S = 0.005
"""How long `wait_for` looks for an event before it sleeps: longer than most rounds; behind it an interrupt's 20 to
60 µs are 1 %."""

_ALIGNMENT = 16
"""Of the arrays in a transfer, in bytes."""
_PAGES = 3
"""Of a sender: it never waits for a round that the schedule hasn't waited for."""
_FIRST_PAGE_BYTES = 64 * 1024
_TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


class Event(Protocol):
    """The end of a transfer; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Return whether it has come."""

    def synchronize(self) -> None:
        """Sleep until it comes."""


class Transfers(Protocol):
    """How bytes come to a device and back."""

    def host_memory(self, n_bytes: int) -> Tensor:
        """Return so much memory (uint8) that the device copies from and to beside its other work."""

    def send(self, source: Tensor, target: Tensor) -> Event:
        """Start to copy host memory to the device, before what is asked of the device next."""

    def fetch(self, source: Tensor, target: Tensor) -> Event:
        """Start to copy to host memory what the device will have when it has done what was asked of it until now."""


class _Now:
    """An event that has come."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


ARRIVED: Event = _Now()
"""The end of what is over already."""


class HostTransfers:
    """`Transfers` of a CPU, which are over when they begin."""

    def host_memory(self, n_bytes: int) -> Tensor:
        """See `Transfers`."""
        return torch.empty(n_bytes, dtype=torch.uint8)

    def send(self, source: Tensor, target: Tensor) -> Event:
        """See `Transfers`."""
        target.copy_(source)
        return ARRIVED

    fetch = send


class CudaTransfers:
    """`Transfers` of a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Set the device."""
        self._device = device

    def host_memory(self, n_bytes: int) -> Tensor:
        """See `Transfers`."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, source: Tensor, target: Tensor) -> Event:
        """See `Transfers`."""
        target.copy_(source, non_blocking=True)
        return _recorded(torch.cuda.current_stream(self._device))

    def fetch(self, source: Tensor, target: Tensor) -> Event:
        """See `Transfers`; on a stream of its own, so that the next round doesn't wait for it."""
        stream = _copy_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        # The source's memory must not be given to others before the copy is over
        source.record_stream(stream)
        return _recorded(stream)


def transfers_of(device: torch.device) -> Transfers:
    """Return how bytes come to a device and back."""
    return CudaTransfers(device) if device.type == "cuda" else HostTransfers()


def wait_for(event: Event, clock: Callable[[], float] = time.monotonic) -> None:
    """Wait where nothing else is to be done: look for the event for `SPIN_S`, and only then sleep.

    Between two looks, other threads may take the core and Python's lock: a look itself keeps the lock.
    """
    end = clock() + SPIN_S
    while not event.query():
        if clock() >= end:
            event.synchronize()
            return
        os.sched_yield()


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Return an array on a device, which works on meanwhile: a plain `.to` waits for all that was asked of it."""
    tensor = torch.from_numpy(array)
    # Torch keeps the pinned memory until the transfer is over, and then for the next one of that size
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Pages:
    """Host memory that a device copies from: one page is written while others are on their way."""

    def __init__(self, transfers: Transfers, n_pages: int, n_bytes: int) -> None:
        """Allocate pages of so many bytes, all 0; each is replaced by a larger one when that is needed."""
        self._transfers = transfers
        self._pages = [(transfers.host_memory(n_bytes).zero_(), ARRIVED) for _ in range(n_pages)]

    def next(self, n_bytes: int) -> Bytes:
        """Return so many bytes of the next page, to be written to, once the device has read what was there.

        The thread sleeps until then: the device has the pages that were sent since to work on.
        """
        memory, read = self._pages.pop(0)
        read.synchronize()
        if len(memory) < n_bytes:
            memory = self._transfers.host_memory(power_of_two(n_bytes)).zero_()
        self._pages.append((memory, ARRIVED))
        page: Bytes = memory[:n_bytes].numpy()
        return page

    def send(self, target: Tensor) -> None:
        """Start to copy the first bytes of the page that `next` returned to a device's (n,)."""
        memory, _ = self._pages[-1]
        self._pages[-1] = (memory, self._transfers.send(memory[: len(target)], target))


class Sender:
    """Sends arrays to a device, all of a call in one transfer."""

    def __init__(self, device: torch.device, transfers: Transfers | None = None) -> None:
        """Set the device, and how to reach it; None: as it is reached."""
        self._device = device
        self._pages = Pages(transfers or transfers_of(device), _PAGES, _FIRST_PAGE_BYTES)

    def send(self, arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
        """Return arrays of int32, int64 or float32 on the device."""
        bounds = list(itertools.accumulate((aligned(array.nbytes) for array in arrays), initial=0))
        page = self._pages.next(bounds[-1])
        for begin, array in zip(bounds, arrays, strict=False):
            page[begin : begin + array.nbytes].view(array.dtype)[:] = array.ravel()
        sent = torch.empty(bounds[-1], dtype=torch.uint8, device=self._device)
        self._pages.send(sent)
        return [
            sent[begin : begin + array.nbytes].view(_TORCH_TYPES[array.dtype]).view(array.shape)
            for begin, array in zip(bounds, arrays, strict=False)
        ]


def aligned(n_bytes: int) -> int:
    """Return where the next array may begin behind so many bytes."""
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def power_of_two(n_bytes: int) -> int:
    """Return the least power of two that isn't smaller: what pinned memory takes anyway."""
    return 1 << max(0, n_bytes - 1).bit_length()


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # blocking: a thread that synchronises sleeps; `wait_for` looks for it without
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
