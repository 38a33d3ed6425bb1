"""Rounds in which contestants take turns, so that a machine's changes of speed hit all alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import median, quantiles

# OpenMP's workers spin for a moment after their last product; the next contestant should have the cores to itself.
_SETTLE_S = 0.1

Contestant = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median, range and quartiles of what several rounds measured.

    The quartiles are those of the values as a whole population, so that they lie within the range.
    """

    median: float
    minimum: float
    maximum: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        if len(values) == 1:
            return cls(*(values[0] for _ in range(5)))
        lower, _, upper = quantiles(values, n=4, method="inclusive")
        return cls(median(values), min(values), max(values), lower, upper)

    def times(self, factor: float) -> "Spread":
        """Return the spread in another unit."""
        return Spread(*(factor * value for value in astuple(self)))


def interleave(
    contestants: Mapping[str, Contestant], rounds: int, settle_s: float = _SETTLE_S
) -> dict[str, list[float]]:
    """Return each contestant's measurement of each round; every second round takes them in reverse order."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in reversed(names) if number % 2 else names:
            time.sleep(settle_s)
            found[name].append(contestants[name]())
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the ratio of one contestant to another, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
