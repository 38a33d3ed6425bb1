"""Host memory in a ring, through which a device's results come: allocated once, one copy and one event a round."""

import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bilm_model.engine.transfer import ARRIVED, Bytes, Event, Transfers, aligned, power_of_two, wait_for

FIRST_BYTES = 64 * 2**20
"""A round of 8,192 steps has 32 MiB of one layer in float32 at original size, and two rounds are on their way."""
MAX_BYTES = 512 * 2**20
"""Torch keeps the smaller memory that a ring has grown out of, which is less than as much again."""


class Arrival:
    """Bytes on their way from a device to the host."""

    def __init__(self, data: Bytes, arrived: Event) -> None:
        """Set where they will be, and when."""
        self._data: Bytes | None = data
        self._arrived = arrived

    def done(self) -> bool:
        """Return whether they have arrived."""
        return self._arrived.query()

    def bytes(self) -> Bytes:
        """Return them, where they lie until `release`; wait for them."""
        assert self._data is not None  # noqa: S101 - nothing asks after `release`
        wait_for(self._arrived)
        return self._data

    def release(self) -> None:
        """Let others have their place."""
        self._data = None

    @property
    def released(self) -> bool:
        """Whether others may have their place."""
        return self._data is None

    def move(self) -> None:
        """Wait for the bytes, and copy them out of the ring."""
        if self._data is not None:
            self._data = self.bytes().copy()


@dataclass(frozen=True, eq=False, slots=True)
class _RingPlace:
    """A part of the ring.

    Attributes:
        begin: Its first byte.
        arrival: What has it; gone when nothing waits for that any more. As all copies come one after another, what is
            still on its way then is over before the next one comes to the same place.
    """

    begin: int
    arrival: "weakref.ref[Arrival]"

    def free(self) -> bool:
        arrival = self.arrival()
        return arrival is None or arrival.released


class HostRing:
    """Takes in what a device has made, a round at a time.

    It grows by doubling. At its bound the oldest bytes are waited for and copied out of it.
    """

    def __init__(self, transfers: Transfers, first_bytes: int = FIRST_BYTES, max_bytes: int = MAX_BYTES) -> None:
        """Allocate the first bytes; sizes are powers of two."""
        self._transfers, self._max_bytes = transfers, power_of_two(max_bytes)
        self._memory = transfers.host_memory(min(power_of_two(first_bytes), self._max_bytes))
        self._places: deque[_RingPlace] = deque()
        self._end = 0

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return len(self._memory)

    def receive(self, source: Tensor) -> Arrival:
        """Start to copy a device's bytes (n,), uint8.

        More than the ring's bound come one part after another, and are waited for.
        """
        n_bytes = len(source)
        if n_bytes > self._max_bytes:
            return self._receive_parts(source)
        begin = self._begin(n_bytes)
        while begin is None:
            if self.n_bytes < self._max_bytes:
                self._grow(n_bytes)
            else:
                self._move_oldest()
            begin = self._begin(n_bytes)
        target = self._memory[begin : begin + n_bytes]
        arrival = Arrival(target.numpy(), self._transfers.fetch(source, target))
        self._places.append(_RingPlace(begin, weakref.ref(arrival)))
        self._end = min(begin + aligned(n_bytes), self.n_bytes)
        return arrival

    def _begin(self, n_bytes: int) -> int | None:
        """Return where so many bytes fit now."""
        while self._places and self._places[0].free():
            self._places.popleft()
        if not self._places:
            return 0 if n_bytes <= self.n_bytes else None
        oldest = self._places[0].begin
        if self._end <= oldest:  # it has come round
            return self._end if self._end + n_bytes <= oldest else None
        if self._end + n_bytes <= self.n_bytes:
            return self._end
        return 0 if n_bytes <= oldest else None

    def _grow(self, n_bytes: int) -> None:
        """Go on in larger memory; the other one lives as long as what came to it."""
        size = min(max(2 * self.n_bytes, power_of_two(n_bytes)), self._max_bytes)
        self._memory = self._transfers.host_memory(size)
        self._places.clear()
        self._end = 0

    def _move_oldest(self) -> None:
        arrival = self._places.popleft().arrival()
        if arrival is not None:
            arrival.move()

    def _receive_parts(self, source: Tensor) -> Arrival:
        whole = np.empty(len(source), dtype=np.uint8)
        for begin in range(0, len(source), self._max_bytes):
            part = source[begin : begin + self._max_bytes]
            arrival = self.receive(part)
            whole[begin : begin + len(part)] = arrival.bytes()
            arrival.release()
        return Arrival(whole, ARRIVED)
