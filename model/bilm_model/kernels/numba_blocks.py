"""Building blocks of kernels that Numba compiles at start: no compiler is needed where this runs.

The kernels run on the OpenMP threads that torch's products run on: a second pool would fight the first for the cores,
since both wait for work by spinning. A row's numbers are computed by the same instructions wherever the row stands.
"""

import ctypes
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from bilm_model.kernels import cells
from bilm_model.kernels.kernel_cache import compiled

_log = logging.getLogger(__name__)

BLOCK = 512
"""Columns that a thread takes at a time, as a whole."""
_MIN_PARALLEL = 4096
"""Numbers below which a second thread costs more than it brings."""
_MIN_WITHOUT_LOCK = 2**15
"""Numbers below which a kernel keeps Python's lock: it takes some ten microseconds, but a thread that gives the lock
back waits until another one lets go of it, which may be milliseconds."""

_THREAD_NUMBER = "bilm_omp_get_thread_num"
CONTRACT = {"contract", "nsz"}  # lets multiply and add become one instruction; NaN stays NaN

# ---- what Numba lacks: memory by address, bfloat16, the thread's number --------------------------------------------

_FLOAT, _INT16, _INT32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


float32s, bfloat16s = _pointer_to(types.float32), _pointer_to(types.uint16)
int32s, int64s = _pointer_to(types.int32), _pointer_to(types.int64)
flags = _pointer_to(types.uint8)


@intrinsic
def shifted(typing_context: Any, pointer: Any, n: Any) -> Any:
    """Return a pointer to the number that lies n numbers further."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), generate


@intrinsic
def load(typing_context: Any, pointer: Any, index: Any) -> Any:
    """Return the number there as float32; uint16 means bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        if pointer.dtype == types.uint16:
            value = builder.bitcast(builder.shl(builder.zext(value, _INT32), _INT32(16)), _FLOAT)
        return value

    return types.float32(pointer, types.int64), generate


@intrinsic
def store(typing_context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Write a float32; to bfloat16 it is rounded to the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = args[2]
        if pointer.dtype == types.uint16:
            bits = builder.bitcast(number, _INT32)
            odd = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
            rounded = builder.add(bits, builder.add(_INT32(0x7FFF), odd))
            number = builder.trunc(builder.lshr(rounded, _INT32(16)), _INT16)
        builder.store(number, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


@intrinsic
def _thread_number(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.module.globals.get(_THREAD_NUMBER)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(_INT32, []), _THREAD_NUMBER)
        return builder.call(function, [])

    return types.int32(), generate


# ---- the arithmetic --------------------------------------------------------------------------------------------------

# tanh(x) ≈ x·P(x²) / Q(x²) for |x| up to the limit, beyond which it is ±1 in float32; within 4e-7 of it.
# The coefficients are those of Eigen's `ptanh` (generic_fast_tanh_float).
_LIMIT = np.float32(7.90531110763549805)
_P = tuple(
    np.float32(coefficient)
    for coefficient in (
        4.89352455891786e-03,
        6.37261928875436e-04,
        1.48572235717979e-05,
        5.12229709037114e-08,
        -8.60467152213735e-11,
        2.00018790482477e-13,
        -2.76076847742355e-16,
    )
)
_Q = tuple(
    np.float32(coefficient)
    for coefficient in (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
)
HALF, TWO = np.float32(0.5), np.float32(2.0)


inner = njit(fastmath=CONTRACT, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For what kernels call: without the means to call it from Python, which take time to compile."""


@inner
def tanh_ratio(x):  # type: ignore[no-untyped-def]
    """Numerator and denominator of tanh(x); σ(2x) is (denominator + numerator) / (2·denominator)."""
    x = _LIMIT if x > _LIMIT else x
    x = -_LIMIT if x < -_LIMIT else x
    s = x * x
    p = x * (_P[0] + s * (_P[1] + s * (_P[2] + s * (_P[3] + s * (_P[4] + s * (_P[5] + s * _P[6]))))))
    q = _Q[0] + s * (_Q[1] + s * (_Q[2] + s * _Q[3]))
    return p, q


@inner
def clip_block(n, x, bound):  # type: ignore[no-untyped-def]
    """Clip n numbers to ±bound, in place; NaN stays NaN."""
    for k in range(n):
        x[k] = bound if x[k] > bound else (-bound if x[k] < -bound else x[k])


@inner
def clear_block(n, target):  # type: ignore[no-untyped-def]
    """Set n numbers to 0."""
    for k in range(n):
        store(target, k, np.float32(0.0))


@inner
def clear_state(n, gates_h, n_cells, c):  # type: ignore[no-untyped-def]
    """Set what `lstm_block` takes of the step before to 0: n neighbouring cells, and what h adds to their gates."""
    clear_block(n, c)
    for gate in range(4):
        clear_block(n, shifted(gates_h, gate * n_cells))


@inner
def copy_block(n, source, target):  # type: ignore[no-untyped-def]
    """Copy n numbers."""
    for k in range(n):
        target[k] = source[k]


@intrinsic
def _bits(typing_context: Any, number: Any) -> Any:
    """Return the bits of a float32 as int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _INT32)

    return types.int32(types.float32), generate


@inner
def half_bits(number):  # type: ignore[no-untyped-def]
    """Return the bits of the nearest float16, ties to even (IEEE 754, 5 bits of exponent, 10 of fraction)."""
    bits = np.int64(_bits(number)) & np.int64(0xFFFFFFFF)
    sign, size = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    normal = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13
    # Below 2⁻¹⁴ the fraction counts units of 2⁻²⁴: which is what stands in the last bits of the number + ½
    small = (np.int64(_bits(abs(number) + np.float32(0.5))) & np.int64(0xFFFFFFFF)) - 0x3F000000
    found = small if size < 0x38800000 else normal
    finite = found if size < 0x477FF000 else 0x7C00  # infinite from 65,520 on
    return sign | (0x7E00 if size > 0x7F800000 else finite)


@inner
def share(n_units, n_threads):  # type: ignore[no-untyped-def]
    """Return the units from..to of this thread."""
    thread = _thread_number() if n_threads > 1 else 0
    return n_units * thread // n_threads, n_units * (thread + 1) // n_threads


# ---- kernels: void (int64 *arguments), arguments[0] the number of threads ------------------------------------------

Kernel = Any
Parallel = Callable[..., None]


def kernel(function: Callable[..., Any]) -> Kernel:
    """Compile a kernel, or take it from the cache. Besides its own module's, it calls this module's functions only."""
    return native(types.void(types.CPointer(types.int64)), function)


def native(signature: Any, function: Callable[..., Any], **options: Any) -> Any:
    """Compile a C function, or take it from the cache; see `kernel`."""
    openmp()
    return compiled(signature, options, function, sys.modules[__name__], cells)


def run(kernel: Kernel, n_numbers: int, *arguments: int, parallel: Parallel | None) -> None:
    """Run a kernel that makes so many numbers, on all threads if that is worth it.

    Args:
        kernel: to run.
        n_numbers: that it makes.
        arguments: of the kernel, after the number of threads.
        parallel: what `openmp` returned; None: one thread runs it.
    """
    # Always the whole team or none of it: OpenMP ends and begins threads when a team's size changes.
    n_threads = torch.get_num_threads() if parallel and n_numbers >= _MIN_PARALLEL else 1
    values = (ctypes.c_int64 * (1 + len(arguments)))(n_threads, *arguments)
    if n_threads > 1 and parallel:
        parallel(kernel.address, values, n_threads, 0)
    elif n_numbers < _MIN_WITHOUT_LOCK:
        _with_lock(kernel.address)(values)
    else:
        kernel.ctypes(values)


@functools.cache
def _with_lock(address: int) -> Callable[[Any], None]:
    """Return what calls a kernel and keeps Python's lock; kernels stay loaded, so an address stays what it is."""
    found: Callable[[Any], None] = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address)
    return found


@functools.cache
def openmp() -> Parallel | None:
    """`GOMP_parallel` of the OpenMP library that torch runs on; None where torch brought none, or another kind.

    To be called before a kernel is compiled: it makes the thread's number known to kernels.
    Source: libgomp's ABI, `void GOMP_parallel (void (*fn) (void *), void *data, unsigned num_threads, unsigned flags)`.
    """
    folder = Path(torch.__file__).parent
    for path in (*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")):
        library = ctypes.CDLL(str(path))  # loaded already: this only finds it
        address = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value
        llvm.add_symbol(_THREAD_NUMBER, address)
        parallel = library.GOMP_parallel
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    _log.warning("found no libgomp beside torch: elementwise arithmetic runs on one thread")
    llvm.add_symbol(_THREAD_NUMBER, ctypes.cast(_ZERO, ctypes.c_void_p).value)
    return None


_ZERO = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
"""Stands for the thread's number where there is one thread; never called then, but a symbol needs an address."""
