"""The choice of how the engine's loops run: compiled where that works, interpreted otherwise."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bilm_model.engine import loops
from bilm_model.kernels.fallbacks import note_fallback

Bind = Callable[[Callable[..., None], Sequence[NDArray[np.int64]]], Callable[[], None]]
"""Makes a function of a loop of `loops` and the arrays that it runs over, which must stay where they are."""


def interpreted(loop: Callable[..., None], arrays: Sequence[NDArray[np.int64]]) -> Callable[[], None]:
    """Return a function that interprets a loop: right everywhere, a hundred times as slow."""
    return functools.partial(loop, *arrays)


@functools.cache
def fastest_bind() -> Bind:
    """Return the fastest way that works here; found out once a process."""
    try:
        # Not at the top: Numba, or what it needs of the platform, may be missing
        from bilm_model.engine.compiled_loops import bind  # noqa: PLC0415

        _compare(bind)
    except Exception as error:
        note_fallback("planner", "compiled loops unavailable, planning is interpreted", error)
        return interpreted
    return bind


def path_of(bind: Bind) -> str:
    """Return the way as a label of the metric `bilm_kernel_path`."""
    return "interpreted" if bind is interpreted else "compiled"


def _compare(bind: Bind) -> None:
    """Try one loop on a few numbers.

    Raises:
        RuntimeError: If it does something else.
    """
    if not np.array_equal(_sample(bind), _sample(interpreted)):
        raise RuntimeError("they don't do what they should")


def _sample(bind: Bind) -> NDArray[np.int64]:
    """Return what taking cache places leaves behind."""
    numbers = np.array([3, -1, 0, -1, -1, 0, 6, 0], dtype=np.int64)
    given = np.array([4, 2, 4, 1, 2, 1], dtype=np.int64)
    arrays = [numbers, given, *np.zeros((7, 6), dtype=np.int64)]
    take = bind(loops.take_cache_places, arrays)
    take()
    given[:3], numbers[loops.N_CACHE_GIVEN] = (0, 1, 2), 3
    take()
    return np.concatenate(arrays)
