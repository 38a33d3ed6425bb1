"""Durations, counted in buckets: as much memory after a week as after a second."""

import math

import numpy as np

from bilm_bench.statistics.percentiles import rank

_GROWTH = 1.02
_LEAST_S, _MOST_S = 1e-6, 1e5
_LOG_GROWTH = math.log(_GROWTH)
_N_BUCKETS = math.ceil(math.log(_MOST_S / _LEAST_S) / _LOG_GROWTH)


class Histogram:
    """Counts durations in buckets, each 2 % wider than the one before, from a microsecond to a day.

    A percentile is the middle of its bucket, in the sense of ratios: at most 1 % off. The least and the largest
    duration are exact.

    Attributes:
        count: Number of durations.
        max_s: The largest duration; 0 if there is none.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_N_BUCKETS, np.int64)
        self.count = 0
        self.max_s = 0.0
        self._min_s = math.inf

    def record(self, seconds: float) -> None:
        """Count a duration; below a microsecond is a microsecond."""
        seconds = max(seconds, _LEAST_S)
        bucket = min(int(math.log(seconds / _LEAST_S) / _LOG_GROWTH), _N_BUCKETS - 1)
        self._counts[bucket] += 1
        self.count += 1
        self.max_s = max(self.max_s, seconds)
        self._min_s = min(self._min_s, seconds)

    def merge(self, other: "Histogram") -> None:
        """Add the counts of another one."""
        self._counts += other._counts
        self.count += other.count
        self.max_s = max(self.max_s, other.max_s)
        self._min_s = min(self._min_s, other._min_s)

    def percentile_s(self, percent: float) -> float | None:
        """Return the duration that so many percent don't exceed; None if nothing was recorded."""
        if not self.count:
            return None
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank(self.count, percent)))
        middle_s: float = _LEAST_S * _GROWTH ** (bucket + 0.5)
        return min(max(middle_s, self._min_s), self.max_s)
