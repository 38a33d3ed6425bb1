"""What a round sends to a device and gets back, on a device whose copies end when the test says so."""

import gc
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from bilm_model.engine.host_ring import Arrival, HostRing
from bilm_model.engine.transfer import SPIN_S, HostTransfers, Pages, Sender, to_device, wait_for
from numpy.typing import NDArray
from torch import Tensor

from tests.support.slow_transfers import SlowTransfers

CPU = torch.device("cpu")


class Ticking:
    """A clock that goes on by a millisecond a look."""

    def __init__(self) -> None:
        self._times = itertools.count(100)

    def __call__(self) -> float:
        return next(self._times) / 1000


class CountedEvent:
    """An event that comes at a look, and notes how it was waited for."""

    def __init__(self, comes_at: int) -> None:
        self.comes_at, self.n_looks, self.n_slept = comes_at, 0, 0

    def query(self) -> bool:
        self.n_looks += 1
        return self.n_looks >= self.comes_at

    def synchronize(self) -> None:
        self.n_slept += 1


N_LOOKS = round(SPIN_S * 1000)


@pytest.mark.parametrize(
    ("comes_at", "n_looks", "n_slept"), [(1, 1, 0), (3, 3, 0), (N_LOOKS, N_LOOKS, 0), (1000, N_LOOKS, 1)]
)
def test_a_wait_sleeps_only_when_it_takes_long(comes_at: int, n_looks: int, n_slept: int) -> None:
    event = CountedEvent(comes_at)
    wait_for(event, Ticking())
    assert event.n_looks == pytest.approx(n_looks, abs=1)
    assert event.n_slept == n_slept


def test_an_error_of_the_device_is_raised() -> None:
    class Broken(CountedEvent):
        def query(self) -> bool:
            raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        wait_for(Broken(1))


def test_arrays_are_sent_in_one_transfer() -> None:
    transfers = SlowTransfers()
    arrays: list[NDArray[Any]] = [
        np.arange(5),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.zeros(0, dtype=np.int64),
        np.arange(30_000),
    ]
    for _ in range(3):
        found = Sender(CPU, transfers).send(arrays)
        assert len(transfers.copies) == 1
        transfers.next_copy()
        assert all(np.array_equal(a, b) for a, b in zip(arrays, found, strict=True))


def test_a_page_is_written_again_when_the_device_has_read_it() -> None:
    transfers = SlowTransfers()
    pages = Pages(transfers, 2, 4)
    targets = [torch.zeros(4, dtype=torch.uint8) for _ in range(4)]
    for i, target in enumerate(targets):
        page = pages.next(4)
        assert transfers.n_slept == max(0, i - 1)
        assert i > 1 or not page.any()  # not whatever the memory had
        page[:] = i
        pages.send(target)
    while transfers.copies:
        transfers.next_copy()
    assert [target.tolist() for target in targets] == [[i] * 4 for i in range(4)]


def test_a_page_grows_by_doubling() -> None:
    transfers = SlowTransfers()
    pages = Pages(transfers, 2, 4)
    for n_bytes in (3, 5, 5, 7, 8, 100, 90):
        assert len(pages.next(n_bytes)) == n_bytes
    assert transfers.sizes == [4, 4, 8, 8, 128, 128]


def test_what_is_on_the_host_needs_no_transfer() -> None:
    array = np.arange(3)
    assert to_device(array, CPU).data_ptr() == array.ctypes.data


# ---- the ring -------------------------------------------------------------------------------------------------------


def bytes_of(number: int, n_bytes: int) -> Tensor:
    return torch.full((n_bytes,), number, dtype=torch.uint8)


def is_number(arrival: Arrival, number: int, n_bytes: int) -> bool:
    return bool((arrival.bytes() == number).all()) and len(arrival.bytes()) == n_bytes


def test_a_ring_is_allocated_once() -> None:
    transfers = SlowTransfers()
    ring = HostRing(transfers, first_bytes=256, max_bytes=1024)
    waiting: list[tuple[Arrival, int, int]] = []
    chance = np.random.default_rng(0)
    for number in range(200):
        n_bytes = int(chance.integers(1, 60))
        waiting.append((ring.receive(bytes_of(number, n_bytes)), number, n_bytes))
        if len(waiting) == 3:
            oldest = waiting.pop(0)
            assert is_number(*oldest)
            oldest[0].release()
    assert transfers.sizes == [256]


def test_a_ring_grows_by_doubling_and_then_moves_the_oldest() -> None:
    transfers = SlowTransfers()
    ring = HostRing(transfers, first_bytes=60, max_bytes=250)
    arrivals = [ring.receive(bytes_of(number, 48)) for number in range(20)]
    assert transfers.sizes == [64, 128, 256]
    assert not arrivals[-1].done()
    assert all(is_number(arrival, number, 48) for number, arrival in enumerate(arrivals))
    large = ring.receive(bytes_of(77, 256))
    assert all(is_number(arrival, number, 48) for number, arrival in enumerate(arrivals))
    assert is_number(large, 77, 256)
    assert transfers.sizes == [64, 128, 256]


def test_a_ring_grows_at_once_to_what_is_needed() -> None:
    transfers = SlowTransfers()
    ring = HostRing(transfers, first_bytes=64, max_bytes=4096)
    assert is_number(ring.receive(bytes_of(5, 1000)), 5, 1000)
    assert transfers.sizes == [64, 1024]


def test_what_is_larger_than_the_bound_comes_in_parts() -> None:
    ring = HostRing(SlowTransfers(), first_bytes=64, max_bytes=64)
    before = ring.receive(bytes_of(3, 20))
    source = torch.arange(1000).to(torch.uint8)
    arrival = ring.receive(source)
    assert arrival.done()
    assert arrival.bytes().tolist() == source.tolist()
    assert is_number(before, 3, 20)
    assert ring.n_bytes == 64


def test_what_nothing_waits_for_leaves_its_place() -> None:
    transfers = SlowTransfers()
    ring = HostRing(transfers, first_bytes=128, max_bytes=128)
    for number in range(10):
        ring.receive(bytes_of(number, 48))  # as after a reset: still on its way
    gc.collect()
    kept = ring.receive(bytes_of(11, 128))
    assert transfers.n_slept == 0
    assert is_number(kept, 11, 128)


def test_random_sizes_and_releases() -> None:
    """Nothing that is held is written over, whatever comes and goes."""
    chance = np.random.default_rng(1)
    ring = HostRing(HostTransfers(), first_bytes=64, max_bytes=512)
    held: list[tuple[Arrival, int, int]] = []
    for number in range(2000):
        n_bytes = int(chance.integers(1, 200 if number % 50 else 700))
        held.append((ring.receive(bytes_of(number % 251, n_bytes)), number % 251, n_bytes))
        while held and chance.random() < 0.45:
            arrival, *expected = held.pop(int(chance.integers(len(held))))
            assert is_number(arrival, *expected)
            arrival.release()
    assert all(is_number(*each) for each in held)
