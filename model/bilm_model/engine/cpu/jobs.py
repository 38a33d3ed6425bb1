"""Jobs that threads take when they are free, inside kernels: on OpenMP's threads, or on one thread beside the caller's.

OpenMP's parallel regions end when the last thread has arrived. Where sentences come one by one its threads have fallen
asleep, and waiting for one to wake up takes as long as the work. So few jobs are taken by the caller and by a `Helper`
that is waited for only while it has a job: a helper that wakes up too late costs nothing.

The threads meet at a board of int64 numbers: [0] the next job, and the number of jobs shifted by 16 bits; [1] the
address of the jobs' arguments; [8] jobs done; [16] whether the helper is asleep, [17] whether it is to end. What
different threads write stands on cache lines of its own.
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bilm_model.kernels.numba_blocks import inner

MAX_JOBS = 2**15
BOARD_SIZE = 24

_INT64 = ir.IntType(64)
_NEXT, _ARGUMENTS, _DONE, _ASLEEP, _ENDED = 0, 1, 8, 16, 17
_SPINS = 8192
"""Looks at the board before the helper falls asleep: some 0.3 ms, which bridges the time between two layers."""
_YIELD_AFTER = 1024
_HAS_PAUSE = llvm.get_process_triple().startswith(("x86_64", "i686"))


@intrinsic
def _read(typing_context, board, at):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "seq_cst", 8)

    return types.int64(types.CPointer(types.int64), types.int64), generate


@intrinsic
def _write(typing_context, board, at, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[2], builder.gep(args[0], [args[1]]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64), types.int64, types.int64), generate


@intrinsic
def _increment(typing_context, board, at):  # type: ignore[no-untyped-def]
    """Return the number before."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), _INT64(1), "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64), generate


@intrinsic
def _pause(typing_context):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _HAS_PAUSE:
            name, function = "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.globals.get(name) or ir.Function(builder.module, function, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _call(typing_context, address):  # type: ignore[no-untyped-def]
    """Call a C function without arguments; a kernel that knew its address couldn't be kept on disk."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inner
def has_jobs(board):  # type: ignore[no-untyped-def]
    """Return whether there is a job that no thread has taken."""
    word = _read(board, _NEXT)
    return word % MAX_JOBS < word // (2 * MAX_JOBS)


@inner
def take_job(board):  # type: ignore[no-untyped-def]
    """Return a job's number, −1 where there is none left."""
    if not has_jobs(board):
        return -1
    word = _increment(board, _NEXT)
    job = word % MAX_JOBS
    return job if job < word // (2 * MAX_JOBS) else -1


@inner
def arguments_of_jobs(board):  # type: ignore[no-untyped-def]
    """Return the address of the arguments of a job that was taken."""
    return _read(board, _ARGUMENTS)


@inner
def end_job(board):  # type: ignore[no-untyped-def]
    """Note that a job is done."""
    _increment(board, _DONE)


@inner
def publish_jobs(board, n_jobs, arguments):  # type: ignore[no-untyped-def]
    """Offer jobs, while none are left of those before."""
    _write(board, _DONE, 0)
    _write(board, _ARGUMENTS, arguments)
    _write(board, _NEXT, n_jobs * 2 * MAX_JOBS)


@inner
def wait_for_jobs(board, n_jobs, yield_thread):  # type: ignore[no-untyped-def]
    """Wait until all jobs are done, which other threads have taken; `yield_thread` is sched_yield's address."""
    n_looks = 0
    while _read(board, _DONE) < n_jobs:
        _pause()
        n_looks += 1
        if n_looks > _YIELD_AFTER and yield_thread != 0:  # the other thread may wait for this core
            _call(yield_thread)


@inner
def spin_for_jobs(board):  # type: ignore[no-untyped-def]
    """Return whether there are jobs, after waiting for some time; if not, it is noted that the helper is asleep."""
    for _ in range(_SPINS):
        if has_jobs(board):
            return True
        _pause()
    _write(board, _ASLEEP, 1)
    return has_jobs(board)


Follow = Callable[[int], None]
"""Takes the jobs of the board at an address, until there have been none for some time."""


class Helper:
    """A thread that takes jobs beside the caller's. It starts when it is first needed, again in a forked process."""

    def __init__(self, follow: Follow) -> None:
        self._follow = follow
        self._board, self._lock = new_board(), threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def board(self) -> int:
        """Address of the board whose jobs it takes."""
        return ctypes.addressof(self._board)

    def wake(self) -> None:
        """See to it that the helper looks at the board; to be called before jobs are published, by one thread."""
        if self._thread is None or not self._thread.is_alive():
            self._start()
        elif self._board[_ASLEEP]:
            self._board[_ASLEEP] = 0
            if self._lock.locked():
                self._lock.release()

    def _start(self) -> None:
        self._board, self._lock = new_board(), threading.Lock()
        self._lock.acquire()
        parts = (self._follow, self._board, self._lock)
        self._thread = threading.Thread(target=_help, args=parts, name="recurrence-helper", daemon=True)
        self._thread.start()
        weakref.finalize(self, _stop, self._board, self._lock)


def new_board() -> Any:
    """Return a board without jobs."""
    return (ctypes.c_int64 * BOARD_SIZE)()


def offer(board: Any, n_jobs: int, arguments: int) -> None:
    """Offer jobs to threads that are started after this."""
    board[_DONE], board[_ARGUMENTS], board[_NEXT] = 0, arguments, n_jobs * 2 * MAX_JOBS


def yield_address() -> int:
    """Return the address of sched_yield, 0 where there is none."""
    if os.name != "posix":
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def _help(follow: Follow, board: Any, lock: Any) -> None:
    while not board[_ENDED]:
        follow(ctypes.addressof(board))
        lock.acquire()


def _stop(board: Any, lock: Any) -> None:
    board[_ENDED] = 1
    if lock.locked():
        lock.release()
