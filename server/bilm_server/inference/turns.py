"""Whose round is next where several engines share a device, and when it is batch's turn. Pure: no clock of its own."""

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")

EIGHTH: Final = 0.125
"""Batch's share where nothing else is set."""

_ROUNDING: Final = 1e-9


class BatchShare:
    """What batch gets of something that comes in units, as turns and rounds: what passes it adds to what is due."""

    def __init__(self, share: float) -> None:
        """Set the share, above 0 and at most 1."""
        self._share, self._credit = share, 0.0

    @property
    def due(self) -> bool:
        """Whether the next unit is batch's."""
        return self._credit >= 1 - self._share - _ROUNDING

    def passed(self, weight: float = 1.0) -> None:
        """Count a unit that batch didn't get."""
        self._credit = min(1.0, self._credit + self._share * weight)

    def taken(self) -> None:
        """Count a unit that it got."""
        self._credit = max(0.0, self._credit - (1 - self._share))

    def forget(self) -> None:
        """Owe it nothing."""
        self._credit = 0.0


class Turns(Generic[T]):
    """Time is shared by weight: next is who has had the least of it for its weight, of those that have work.

    Start-time fair queueing (Goyal et al. 1996), with the length of a turn known when it is over. Who had no work for a
    while is owed nothing for it: it takes its place beside the one whose turn it is.
    """

    def __init__(self) -> None:
        self._weights: dict[T, float] = {}
        self._had: dict[T, float] = {}
        self._ready: frozenset[T] = frozenset()
        self._level = 0.0

    def add(self, item: T, weight: float) -> None:
        """Let somebody take turns; of two with work, one of twice the weight has twice the time."""
        self._weights[item], self._had[item] = weight, self._level

    def remove(self, item: T) -> None:
        """Let somebody take turns no more."""
        del self._weights[item], self._had[item]
        self._ready -= {item}

    def next(self, ready: Sequence[T]) -> T:
        """Return whose turn it is, of these, which have work: one at least."""
        for item in ready:
            if item not in self._ready:
                self._had[item] = max(self._had[item], self._level)
        self._ready = frozenset(ready)
        chosen = min(ready, key=self._had.__getitem__)
        self._level = self._had[chosen]
        return chosen

    def took(self, item: T, seconds: float) -> None:
        """Count a turn that is over."""
        self._had[item] += seconds / self._weights[item]
