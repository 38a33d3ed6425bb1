"""The loops of `loops`, compiled by Numba, over arrays whose addresses they are given.

A loop takes microseconds, so it is called with Python's lock held: to give the lock back would mean to wait for it.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import carray, types
from numpy.typing import NDArray

from bilm_model.engine import loops
from bilm_model.kernels import numba_blocks
from bilm_model.kernels.kernel_cache import compiled
from bilm_model.kernels.numba_blocks import int64s

_SIGNATURE = types.void(types.CPointer(types.int64))
_CALL = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


def _enter(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, 16)
    loops.enter(
        int64s(a[0]), int64s(a[1]), int64s(a[2]), int64s(a[3]), int64s(a[4]), int64s(a[5]), int64s(a[6]), int64s(a[7]),
        int64s(a[8]), int64s(a[9]), int64s(a[10]), int64s(a[11]), int64s(a[12]), int64s(a[13]), int64s(a[14]),
        int64s(a[15]),
    )  # fmt: skip


def _withdraw(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, 5)
    loops.withdraw(int64s(a[0]), int64s(a[1]), int64s(a[2]), int64s(a[3]), int64s(a[4]))


def _leave(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, 12)
    loops.leave(
        int64s(a[0]), int64s(a[1]), int64s(a[2]), int64s(a[3]), int64s(a[4]), int64s(a[5]), int64s(a[6]), int64s(a[7]),
        int64s(a[8]), int64s(a[9]), int64s(a[10]), int64s(a[11]),
    )  # fmt: skip


def _read_steps(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, 8)
    loops.read_steps(
        int64s(a[0]), int64s(a[1]), int64s(a[2]), int64s(a[3]), int64s(a[4]), int64s(a[5]), int64s(a[6]), int64s(a[7])
    )  # fmt: skip


def _plan(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, 26)
    loops.plan(
        int64s(a[0]), int64s(a[1]), int64s(a[2]), int64s(a[3]), int64s(a[4]), int64s(a[5]), int64s(a[6]), int64s(a[7]),
        int64s(a[8]), int64s(a[9]), int64s(a[10]), int64s(a[11]), int64s(a[12]), int64s(a[13]), int64s(a[14]),
        int64s(a[15]), int64s(a[16]), int64s(a[17]), int64s(a[18]), int64s(a[19]), int64s(a[20]), int64s(a[21]),
        int64s(a[22]), int64s(a[23]), int64s(a[24]), int64s(a[25]),
    )  # fmt: skip


def _take_cache_places(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, 9)
    loops.take_cache_places(
        int64s(a[0]), int64s(a[1]), int64s(a[2]), int64s(a[3]), int64s(a[4]), int64s(a[5]), int64s(a[6]), int64s(a[7]),
        int64s(a[8]),
    )  # fmt: skip


def _forget_cache_places(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, 5)
    loops.forget_cache_places(int64s(a[0]), int64s(a[1]), int64s(a[2]), int64s(a[3]), int64s(a[4]))


_COMPILED: dict[Callable[..., None], Callable[..., None]] = {
    loops.enter: _enter,
    loops.withdraw: _withdraw,
    loops.leave: _leave,
    loops.read_steps: _read_steps,
    loops.plan: _plan,
    loops.take_cache_places: _take_cache_places,
    loops.forget_cache_places: _forget_cache_places,
}


@functools.cache
def _kernel(loop: Callable[..., None]) -> Any:
    """Return a compiled loop: once a process, as machine code stays in memory, and each reset binds loops anew."""
    return compiled(_SIGNATURE, {}, _COMPILED[loop], loops, numba_blocks, sys.modules[__name__])


def bind(loop: Callable[..., None], arrays: Sequence[NDArray[np.int64]]) -> Callable[[], None]:
    """Return a function that runs a loop over arrays, which must stay where they are.

    Raises:
        Exception: whatever keeps it from being compiled.
    """
    kernel = _kernel(loop)
    call = _CALL(kernel.address)
    addresses = (ctypes.c_int64 * len(arrays))(*(array.ctypes.data for array in arrays))
    address = ctypes.addressof(addresses)
    kept = (kernel, addresses, arrays)

    def run(_: object = kept) -> None:
        call(address)

    return run
