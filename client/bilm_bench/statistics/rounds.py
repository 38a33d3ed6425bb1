"""Contestants take turns; what is compared is compared within a round, so that a machine's moods hit all alike."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

# OpenMP's workers spin for a moment after their last product; the next contestant should have the cores to itself.
_SETTLE_S = 0.1

Contestant = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """What several rounds found.

    Attributes:
        median: the figure.
        minimum: of the rounds.
        maximum: of the rounds.
    """

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def times(self, factor: float) -> "Spread":
        """In another unit."""
        return Spread(self.median * factor, self.minimum * factor, self.maximum * factor)


def interleave(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Each contestant's figure of each round; every second round goes through them from the end."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in reversed(names) if number % 2 else names:
            time.sleep(_SETTLE_S)
            found[name].append(contestants[name]())
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """One contestant against another, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent of the values don't exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(1, math.ceil(len(ranked) * percent / 100)) - 1]
