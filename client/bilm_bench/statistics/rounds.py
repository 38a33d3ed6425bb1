"""Rounds in which contestants take turns, so that a machine's changes of speed hit all alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

# OpenMP's workers spin for a moment after their last product; the next contestant should have the cores to itself.
_SETTLE_S = 0.1

Contestant = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median and range of what several rounds measured."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(median(values), min(values), max(values))

    def times(self, factor: float) -> "Spread":
        """Return the spread in another unit."""
        return Spread(self.median * factor, self.minimum * factor, self.maximum * factor)


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
