"""The arithmetic between products as fused kernels on a CPU."""

import ctypes
import functools

import numpy as np
import torch
from numba import carray
from torch import Tensor

from bilm_model.kernels.cells import lstm_block
from bilm_model.kernels.numba_blocks import (
    BLOCK,
    HALF,
    TWO,
    Kernel,
    bfloat16s,
    clear_block,
    clear_state,
    copy_block,
    flags,
    float32s,
    inner,
    int64s,
    kernel,
    load,
    openmp,
    run,
    share,
    shifted,
    store,
    tanh_ratio,
)


@inner
def _highway_block(n, x, gate, transform, y):  # type: ignore[no-untyped-def]
    for k in range(n):
        p, q = tanh_ratio(HALF * load(gate, k))
        t = load(transform, k)
        t = np.float32(0.0) if t < np.float32(0.0) else t
        store(y, k, load(x, k) + (q + p) / (TWO * q) * (t - load(x, k)))


@inner
def _raise_peaks(n, responses, peaks):  # type: ignore[no-untyped-def]
    for k in range(n):
        response = load(responses, k)
        peaks[k] = response if response > peaks[k] or response != response else peaks[k]  # noqa: PLR0124 - NaN


@inner
def _activate(n, peaks, bias, tanh):  # type: ignore[no-untyped-def]
    for k in range(n):
        x = peaks[k] + bias[k]
        if tanh:
            p, q = tanh_ratio(x)
            peaks[k] = p / q
        else:
            peaks[k] = np.float32(0.0) if x < np.float32(0.0) else x


@inner
def _lstm(arguments, gates_h, gates_x, m):  # type: ignore[no-untyped-def]
    n_threads, n_rows, n_cells, block = carray(arguments, 4)
    index, c, slots, fresh = carray(arguments, 10)[6:]
    clip = float32s(arguments[11])[0]
    n_blocks = (n_cells + block - 1) // block
    first, end = share(n_rows * n_blocks, n_threads)
    for unit in range(first, end):
        row, k = unit // n_blocks, unit % n_blocks * block
        n = min(block, n_cells - k)
        its_h, its_x = shifted(gates_h, row * 4 * n_cells + k), shifted(gates_x, int64s(index)[row] * 4 * n_cells + k)
        its_c, its_m = float32s(c + (int64s(slots)[row] * n_cells + k) * 4), shifted(m, row * n_cells + k)
        if flags(fresh)[row]:
            clear_state(n, its_h, n_cells, its_c)
        lstm_block(n, its_h, n_cells, its_x, n_cells, its_c, its_m, clip)


@inner
def _output(n, y, x, returns_sum, returned, following):  # type: ignore[no-untyped-def] # noqa: PLR0917
    for k in range(n):
        total = load(y, k) + load(x, k)
        following[k] = total
        returned[k] = total if returns_sum else load(y, k)


@inner
def _widen(n, source, target):  # type: ignore[no-untyped-def]
    for k in range(n):
        target[k] = load(source, k)


@inner
def _outputs(arguments, y):  # type: ignore[no-untyped-def]
    n_threads, n_padded, n_steps, width, _, x, places, returns_sum, returned, following = carray(arguments, 10)
    first, end = share(n_padded, n_threads)
    for step in range(first, end):
        its_following = float32s(following + 4 * step * width)
        if step >= n_steps:
            clear_block(width, its_following)
            continue
        its_y, its_place = shifted(y, step * width), float32s(returned + 4 * int64s(places)[step] * width)
        if x != 0:
            _output(width, its_y, float32s(x + 4 * step * width), returns_sum, its_place, its_following)
        else:
            _widen(width, its_y, its_place)
            _widen(width, its_y, its_following)


@inner
def _keep(arguments, y):  # type: ignore[no-untyped-def]
    n_threads, n_rows, width, _, last, h, slots = carray(arguments, 7)
    first, end = share(n_rows, n_threads)
    for row in range(first, end):
        _widen(width, shifted(y, int64s(last)[row] * width), float32s(h + 4 * int64s(slots)[row] * width))


@inner
def _highway(arguments, z):  # type: ignore[no-untyped-def]
    n_threads, n_rows, width, x, _, y = carray(arguments, 6)
    first, end = share(n_rows, n_threads)
    for row in range(first, end):
        gate, transform = shifted(z, row * 2 * width), shifted(z, (row * 2 + 1) * width)
        at = row * width * 4
        _highway_block(width, float32s(x + at), gate, transform, float32s(y + at))


@inner
def _peaks(arguments, responses):  # type: ignore[no-untyped-def]
    n_threads, n_tokens, width, n_windows, _, floor, bias, tanh, y = carray(arguments, 9)
    first, end = share(n_tokens, n_threads)
    for token in range(first, end):
        largest = float32s(y + token * width * 4)
        copy_block(width, float32s(floor), largest)
        for window in range(token * n_windows, (token + 1) * n_windows):
            _raise_peaks(width, shifted(responses, window * width), largest)
        _activate(width, largest, float32s(bias), tanh != 0)


# ---- the same for each number format, without closures, which the cache of compiled kernels can't compare ------------


def _lstm_float32(arguments):  # type: ignore[no-untyped-def]
    _lstm(arguments, float32s(arguments[4]), float32s(arguments[5]), float32s(arguments[10]))


def _lstm_bfloat16(arguments):  # type: ignore[no-untyped-def]
    _lstm(arguments, bfloat16s(arguments[4]), bfloat16s(arguments[5]), bfloat16s(arguments[10]))


def _outputs_float32(arguments):  # type: ignore[no-untyped-def]
    _outputs(arguments, float32s(arguments[4]))


def _outputs_bfloat16(arguments):  # type: ignore[no-untyped-def]
    _outputs(arguments, bfloat16s(arguments[4]))


def _keep_float32(arguments):  # type: ignore[no-untyped-def]
    _keep(arguments, float32s(arguments[3]))


def _keep_bfloat16(arguments):  # type: ignore[no-untyped-def]
    _keep(arguments, bfloat16s(arguments[3]))


def _highway_float32(arguments):  # type: ignore[no-untyped-def]
    _highway(arguments, float32s(arguments[4]))


def _highway_bfloat16(arguments):  # type: ignore[no-untyped-def]
    _highway(arguments, bfloat16s(arguments[4]))


def _peaks_float32(arguments):  # type: ignore[no-untyped-def]
    _peaks(arguments, float32s(arguments[4]))


def _peaks_bfloat16(arguments):  # type: ignore[no-untyped-def]
    _peaks(arguments, bfloat16s(arguments[4]))


@functools.cache
def _kernels(product_dtype: torch.dtype) -> list[Kernel]:
    float32 = (_lstm_float32, _outputs_float32, _keep_float32, _highway_float32, _peaks_float32)
    bfloat16 = (_lstm_bfloat16, _outputs_bfloat16, _keep_bfloat16, _highway_bfloat16, _peaks_bfloat16)
    return [kernel(function) for function in (bfloat16 if product_dtype == torch.bfloat16 else float32)]


class FusedElementwise:
    """`elementwise.Elementwise` on a CPU, for products in one format."""

    def __init__(self, product_dtype: torch.dtype, *, one_thread: bool = False) -> None:
        """Compile the kernels, which takes a second or two, or take them from the cache.

        Args:
            product_dtype: format of what products take and give.
            one_thread: whether to do without OpenMP, as where there is none.
        """
        found = openmp()
        self._parallel = None if one_thread else found
        self._run = functools.partial(run, parallel=self._parallel)
        self._lstm, self._outputs, self._keep, self._highway, self._peaks = _kernels(product_dtype)

    @property
    def name(self) -> str:
        """What it is, for people to read."""
        return "fused kernels" if self._parallel else "fused kernels on one thread"

    @property
    def path(self) -> str:
        """See `Elementwise`."""
        return "fused" if self._parallel else "fused_one_thread"

    def lstm(
        self,
        gates_h: Tensor,
        gates_x: Tensor,
        index: Tensor,
        c: Tensor,
        slots: Tensor,
        *,
        fresh: Tensor,
        clip: float,
        out: Tensor,
    ) -> None:
        """See `Elementwise`."""
        n_rows, n_cells = len(index), c.shape[1]
        bound = ctypes.c_float(clip)
        addresses = [tensor.data_ptr() for tensor in (gates_h, gates_x, index, c, slots, fresh, out)]
        self._run(self._lstm, n_rows * n_cells, n_rows, n_cells, BLOCK, *addresses, ctypes.addressof(bound))

    def outputs(
        self, y: Tensor, x: Tensor | None, places: Tensor, *, returns_sum: bool, returned: Tensor, following: Tensor
    ) -> None:
        """See `Elementwise`."""
        addresses = (y.data_ptr(), 0 if x is None else x.data_ptr(), places.data_ptr())
        n_following, width = following.shape
        numbers = (n_following, *y.shape, *addresses, returns_sum, returned.data_ptr(), following.data_ptr())
        self._run(self._outputs, n_following * width, *numbers)

    def keep(self, y: Tensor, last: Tensor, h: Tensor, slots: Tensor) -> None:
        """See `Elementwise`."""
        n_rows, width = len(last), y.shape[1]
        addresses = (tensor.data_ptr() for tensor in (y, last, h, slots))
        self._run(self._keep, n_rows * width, n_rows, width, *addresses)

    def highway(self, x: Tensor, z: Tensor) -> Tensor:
        """See `Elementwise`."""
        y = torch.empty_like(x)
        self._run(self._highway, x.numel(), *x.shape, x.data_ptr(), z.data_ptr(), y.data_ptr())
        return y

    def peaks(
        self, responses: Tensor, n_windows: int, floor: Tensor, bias: Tensor, activation: str, *, out: Tensor
    ) -> None:
        """See `Elementwise`."""
        n_tokens, width = out.shape
        addresses = (responses.data_ptr(), floor.data_ptr(), bias.data_ptr())
        numbers = (n_tokens, width, n_windows, *addresses, activation == "tanh", out.data_ptr())
        self._run(self._peaks, n_tokens * n_windows * width, *numbers)
