"""Percentiles by nearest rank. Pure."""

import math
from collections.abc import Sequence

_TOLERANCE = 1e-9  # 99.9 % of 1,000 values is the 999th, whatever the product rounds to


def rank(count: int, percent: float) -> int:
    """Return which of `count` ranked values, from 1, is the smallest that so many per cent don't exceed."""
    return max(1, math.ceil(count * percent / 100 - _TOLERANCE))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many per cent of the values don't exceed."""
    return sorted(values)[rank(len(values), percent) - 1]
