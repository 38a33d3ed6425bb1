"""Which sentences join the engine next. Pure: no gRPC, no torch, no clock of its own."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

from bilm_model.engine.types import Capacity

from bilm_server.limits import for_long_sentences

T = TypeVar("T", bound=Hashable)

LONG_STEPS = 128
"""Sentences of more steps (tokens and boundaries) are long: they leave some capacity to the others."""


class Decision(NamedTuple, Generic[T]):
    """What to do next.

    Attributes:
        items: to join; each takes its capacity until `release`.
        expired: whose deadline has passed; not to be computed.
    """

    items: tuple[T, ...]
    expired: tuple[T, ...]


class _Queue(Generic[T]):
    """What one caller has waiting, and since when it waits for its turn (a count of turns).

    An entry is the rows and steps that an item needs, and its deadline. Numbers rather than objects: this is done for
    every sentence of every round, between two rounds.
    """

    __slots__ = ("entries", "since")

    def __init__(self, since: int) -> None:
        self.entries: OrderedDict[T, tuple[int, int, float]] = OrderedDict()
        self.since = since


class _Lane(Generic[T]):
    """Callers take turns, an entry a turn.

    Attributes:
        capacity: that its items may take together.
        rows: that they take.
        steps: that they take.
        n_waiting: items that wait.
        queues: by caller; the first one's turn is next.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.rows = self.steps = self.n_waiting = 0
        self.queues: OrderedDict[Hashable, _Queue[T]] = OrderedDict()

    def add(self, caller: Hashable, item: T, entry: tuple[int, int, float], now: int) -> None:
        queue = self.queues.get(caller)
        if queue is None:
            queue = self.queues[caller] = _Queue(now)
        queue.entries[item] = entry
        self.n_waiting += 1

    def remove(self, caller: Hashable, item: T) -> bool:
        queue = self.queues.get(caller)
        if queue is None or queue.entries.pop(item, None) is None:
            return False
        self.n_waiting -= 1
        if not queue.entries:
            del self.queues[caller]
        return True

    def first(self) -> tuple[Hashable, _Queue[T]]:
        """Return the caller whose turn it is, and its queue."""
        return next(iter(self.queues.items()))

    def pop(self, now: int) -> T:
        """Take out the item whose turn it is and end its caller's turn."""
        caller, queue = self.first()
        item, _ = queue.entries.popitem(last=False)
        self.n_waiting -= 1
        queue.since = now
        if queue.entries:
            self.queues.move_to_end(caller)
        else:
            del self.queues[caller]
        return item


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
        return bool(self._short.queues or self._long.queues)

    def __len__(self) -> int:
        """Sentences that wait."""
        return self._short.n_waiting + self._long.n_waiting

    @property
    def used(self) -> Capacity:
        """What is taken."""
        return Capacity(self._short.rows + self._long.rows, self._short.steps + self._long.steps)

    def ever_fits(self, need: Capacity) -> bool:
        """Return whether a sentence that needs so much could join if nothing else had."""
        return self._lane(need.steps).capacity.fits(need)

    def add(self, item: T, caller: Hashable, need: Capacity, deadline_s: float) -> None:
        """Let a sentence wait, until the deadline on the clock that `decide` is given."""
        self._turns += 1
        self._lane(need.steps).add(caller, item, (need.rows, need.steps, deadline_s), self._turns)

    def remove(self, item: T, caller: Hashable) -> bool:
        """Take out one waiting sentence of a caller; return whether it was waiting."""
        return self._short.remove(caller, item) or self._long.remove(caller, item)

    def release(self, need: Capacity) -> None:
        """Give back the capacity of a sentence that has left the engine."""
        lane = self._lane(need.steps)
        lane.rows -= need.rows
        lane.steps -= need.steps

    def decide(self, now_s: float) -> Decision[T]:
        """Take out the sentences that join now."""
        items: list[T] = []
        expired: list[T] = []
        while (turn := self._next_turn(now_s)) is not None:
            lane, (rows, steps, deadline_s) = turn
            self._turns += 1
            item = lane.pop(self._turns)
            if deadline_s <= now_s:
                expired.append(item)
            else:
                lane.rows += rows
                lane.steps += steps
                items.append(item)
        return Decision(tuple(items), tuple(expired))

    def drain(self) -> tuple[T, ...]:
        """Take out everything that waits."""
        items: list[T] = []
        for lane in (self._short, self._long):
            while lane.queues:
                items.append(lane.pop(self._turns))
        return tuple(items)

    def _next_turn(self, now_s: float) -> tuple[_Lane[T], tuple[int, int, float]] | None:
        """Return the lane whose head is to be taken out, and the head's entry; None if all must wait."""
        short, long, whole = self._short, self._long, self._capacity
        for lane, queue in self._by_turn():
            head = rows, steps, deadline_s = next(iter(queue.entries.values()))
            if deadline_s <= now_s:
                return lane, head
            if lane.rows + rows <= lane.capacity.rows and lane.steps + steps <= lane.capacity.steps:
                rows, steps = rows + short.rows + long.rows, steps + short.steps + long.steps
                return (lane, head) if rows <= whole.rows and steps <= whole.steps else None
        return None

    def _by_turn(self) -> Sequence[tuple[_Lane[T], _Queue[T]]]:
        """Return the lanes in which something waits, with the queues whose turn it is, by how long they wait for it."""
        turns = [(lane, lane.first()[1]) for lane in (self._short, self._long) if lane.queues]
        if len(turns) > 1 and turns[1][1].since < turns[0][1].since:
            turns.reverse()
        return turns

    def _lane(self, steps: int) -> _Lane[T]:
        return self._long if steps > LONG_STEPS else self._short


def _for_long_ones(capacity: Capacity) -> Capacity:
    return Capacity(for_long_sentences(capacity.rows), for_long_sentences(capacity.steps))
