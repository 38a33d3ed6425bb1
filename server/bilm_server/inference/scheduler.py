"""Which sentences join the engine next. Pure: no gRPC, no torch, no clock of its own."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from bilm_model.engine.types import Capacity

from bilm_server.limits import for_long_sentences

T = TypeVar("T", bound=Hashable)

LONG_STEPS = 128
"""Sentences of more steps (tokens and boundaries) are long: they leave some capacity to the others."""


@dataclass(frozen=True)
class Decision(Generic[T]):
    """What to do next.

    Attributes:
        items: to join; each takes its capacity until `release`.
        expired: whose deadline has passed; not to be computed.
    """

    items: tuple[T, ...]
    expired: tuple[T, ...]


@dataclass(frozen=True)
class _Entry(Generic[T]):
    item: T
    need: Capacity
    deadline_s: float


@dataclass
class _Queue(Generic[T]):
    """What one caller has waiting, and since when it waits for its turn (a count of turns)."""

    entries: OrderedDict[T, _Entry[T]]
    since: int


class _Lane(Generic[T]):
    """Callers take turns, an entry a turn."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.used = Capacity(0, 0)
        self.n_waiting = 0
        self._queues: OrderedDict[Hashable, _Queue[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, caller: Hashable, entry: _Entry[T], now: int) -> None:
        self._queues.setdefault(caller, _Queue(OrderedDict(), now)).entries[entry.item] = entry
        self.n_waiting += 1

    def remove(self, caller: Hashable, item: T) -> bool:
        queue = self._queues.get(caller)
        if queue is None or queue.entries.pop(item, None) is None:
            return False
        self.n_waiting -= 1
        if not queue.entries:
            del self._queues[caller]
        return True

    def since(self) -> int:
        """Return when the caller whose turn it is began to wait for it."""
        return next(iter(self._queues.values())).since

    def head(self) -> _Entry[T]:
        return next(iter(next(iter(self._queues.values())).entries.values()))

    def pop(self, now: int) -> _Entry[T]:
        """Take the head out and end its caller's turn."""
        caller, queue = next(iter(self._queues.items()))
        _, entry = queue.entries.popitem(last=False)
        self.n_waiting -= 1
        queue.since = now
        if queue.entries:
            self._queues.move_to_end(caller)
        else:
            del self._queues[caller]
        return entry


class Scheduler(Generic[T]):
    """Callers take turns, the one that has waited longest first, one sentence a turn, as long as there is capacity.

    So a caller with one sentence waits for one sentence of every other caller at most, and not for a caller with a
    thousand. No batching delay: a sentence that fits is scheduled at once. A sentence whose turn it is and that doesn't
    fit holds the others up until it does, so that none starves.

    Long sentences stay long: they would fill all rows and keep short ones waiting for thousands of ticks. So they have
    a lane of their own with a little less capacity. One that waits for other long ones lets short ones pass; one that
    waits for capacity that short ones take doesn't.

    An engine may take some sentences ahead, so that a row that ends one can begin the next at once. Long ones never run
    ahead: those that join have rows, as many as long ones may have, and so do short ones.
    """

    def __init__(self, capacity: Capacity, ahead: int = 0) -> None:
        """Set what the engine takes.

        Args:
            capacity: What it computes at a time.
            ahead: Sentences that may join beyond that.
        """
        self._capacity = capacity + Capacity(ahead, 0)
        self._short: _Lane[T] = _Lane(self._capacity)
        self._long: _Lane[T] = _Lane(_for_long_ones(capacity))
        self._turns = 0

    def __bool__(self) -> bool:
        """Whether any sentence waits."""
        return bool(self._short or self._long)

    def __len__(self) -> int:
        """Sentences that wait."""
        return self._short.n_waiting + self._long.n_waiting

    @property
    def used(self) -> Capacity:
        """What is taken."""
        return self._short.used + self._long.used

    def ever_fits(self, need: Capacity) -> bool:
        """Return whether a sentence that needs so much could join if nothing else had."""
        return self._lane(need).capacity.fits(need)

    def add(self, item: T, caller: Hashable, need: Capacity, deadline_s: float) -> None:
        """Let a sentence wait, until the deadline on the clock that `decide` is given."""
        self._turns += 1
        self._lane(need).add(caller, _Entry(item, need, deadline_s), self._turns)

    def remove(self, item: T, caller: Hashable) -> bool:
        """Take out one waiting sentence of a caller; return whether it was waiting."""
        return any(lane.remove(caller, item) for lane in self._lanes())

    def release(self, need: Capacity) -> None:
        """Give back the capacity of a sentence that has left the engine."""
        self._lane(need).used -= need

    def decide(self, now_s: float) -> Decision[T]:
        """Take out the sentences that join now."""
        items: list[T] = []
        expired: list[T] = []
        while (lane := self._whose_turn(now_s)) is not None:
            self._turns += 1
            entry = lane.pop(self._turns)
            if entry.deadline_s <= now_s:
                expired.append(entry.item)
            else:
                lane.used += entry.need
                items.append(entry.item)
        return Decision(tuple(items), tuple(expired))

    def drain(self) -> tuple[T, ...]:
        """Take out everything that waits."""
        items: list[T] = []
        for lane in self._lanes():
            while lane:
                items.append(lane.pop(self._turns).item)
        return tuple(items)

    def _whose_turn(self, now_s: float) -> _Lane[T] | None:
        """Return the lane whose head is to be taken out; None if all must wait."""
        for lane in sorted(filter(None, self._lanes()), key=_Lane.since):
            head = lane.head()
            if head.deadline_s <= now_s:
                return lane
            if (lane.capacity - lane.used).fits(head.need):
                return lane if (self._capacity - self.used).fits(head.need) else None
        return None

    def _lanes(self) -> Iterator[_Lane[T]]:
        yield from (self._short, self._long)

    def _lane(self, need: Capacity) -> _Lane[T]:
        return self._long if need.steps > LONG_STEPS else self._short


def _for_long_ones(capacity: Capacity) -> Capacity:
    return Capacity(for_long_sentences(capacity.rows), for_long_sentences(capacity.steps))
