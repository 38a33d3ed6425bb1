"""Which sentences join the engine next. Pure: no gRPC, no torch, no clock of its own."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

from bilm_api.constants import Priority
from bilm_model.engine.types import Capacity

from bilm_server.inference.turns import EIGHTH, BatchShare
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
        limit: what its items may take together.
        is_batch: whether they are batch.
        rows: that they take.
        steps: that they take.
        n_waiting: items that wait.
        queues: by caller; the first one's turn is next.
    """

    __slots__ = ("is_batch", "limit", "n_waiting", "queues", "rows", "steps")

    def __init__(self, limit: Capacity, is_batch: bool) -> None:
        self.limit, self.is_batch = limit, is_batch
        self.rows = self.steps = self.n_waiting = 0
        self.queues: OrderedDict[Hashable, _Queue[T]] = OrderedDict()

    def fits(self, rows: int, steps: int, limit: Capacity) -> bool:
        return self.rows + rows <= limit.rows and self.steps + steps <= limit.steps

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


class _Turn(NamedTuple, Generic[T]):
    """The head of a lane, and whether it is to be taken out: it has expired, or it fits."""

    lane: _Lane[T]
    rows: int
    steps: int
    since: int
    fits: bool
    expired: bool


class _Class(Generic[T]):
    """The sentences of one priority, short and long ones.

    Long sentences stay long: they would fill all rows and keep short ones waiting for thousands of ticks. So they have
    a lane of their own with a little less capacity. One that waits for other long ones lets short ones pass; one that
    waits for capacity that short ones take doesn't.
    """

    __slots__ = ("long", "short")

    def __init__(self, limit: Capacity, long_limit: Capacity, *, is_batch: bool) -> None:
        self.short: _Lane[T] = _Lane(limit, is_batch)
        self.long: _Lane[T] = _Lane(long_limit, is_batch)

    def __bool__(self) -> bool:
        """Whether any sentence waits."""
        return bool(self.short.queues or self.long.queues)

    def __len__(self) -> int:
        """Sentences that wait."""
        return self.short.n_waiting + self.long.n_waiting

    @property
    def rows(self) -> int:
        return self.short.rows + self.long.rows

    @property
    def steps(self) -> int:
        return self.short.steps + self.long.steps

    def lane(self, steps: int) -> _Lane[T]:
        return self.long if steps > LONG_STEPS else self.short

    def next_turn(self, now_s: float, free_rows: int, free_steps: int) -> _Turn[T] | None:
        """Return the head whose turn it is; None if nothing waits but long sentences for other long ones."""
        for lane, queue in self.by_turn():
            rows, steps, deadline_s = next(iter(queue.entries.values()))
            if deadline_s <= now_s:
                return _Turn(lane, rows, steps, queue.since, True, True)
            if lane.fits(rows, steps, lane.limit):
                return _Turn(lane, rows, steps, queue.since, rows <= free_rows and steps <= free_steps, False)
        return None

    def by_turn(self) -> Sequence[tuple[_Lane[T], _Queue[T]]]:
        """Return the lanes in which something waits, with the queues whose turn it is, by how long they wait for it."""
        turns = [(lane, lane.first()[1]) for lane in (self.short, self.long) if lane.queues]
        if len(turns) > 1 and turns[1][1].since < turns[0][1].since:
            turns.reverse()
        return turns


_FEW_PARTS = 32
"""So many times fewer interactive rows than the engine has are few: rounds of them leave most of it unused."""
_LEAST_WEIGHT = 0.5
"""What a round of many interactive rows adds to what is due to batch, a round of few adding 1."""


class Scheduler(Generic[T]):
    """Callers take turns, the one that has waited longest first, one sentence a turn, as long as there is capacity.

    So a caller with one sentence waits for one sentence of every other caller at most, and not for a caller with a
    thousand. No batching delay: a sentence that fits is scheduled at once. A sentence whose turn it is and that doesn't
    fit holds the others up until it does, so that none starves. See `_Class` for long sentences.

    Batch sentences never take the rows and steps that are closed to long ones. While no interactive sentence waits,
    they take rows that are free; otherwise they have their share of the turns. For one whose turn it is and that
    doesn't fit, capacity is kept, and interactive ones join beside it. Long interactive ones leave an eighth of what
    batch leaves to short ones. One that waits for what batch holds, and has waited longer, keeps batch from joining.

    Batch has its share of the rounds while few interactive rows run, a thirty-second of all. Rounds of fewer leave more
    of the machine unused, and fewer sentences wait for them, so batch has more then, inversely to the square of their
    number, one round in two at most. While many run it has less, half of its share at least.

    An engine may take some sentences ahead, so that a row that ends one can begin the next at once. Long ones never run
    ahead: those that join have rows, as many as long ones may have, and so do short ones.
    """

    def __init__(self, capacity: Capacity, ahead: int = 0, batch_share: float = EIGHTH) -> None:
        """Set what the engine takes.

        Args:
            capacity: What it computes at a time.
            ahead: Sentences that may join beyond that.
            batch_share: Of turns, and of rounds of few interactive rows, that go to batch sentences; above 0.
        """
        self._capacity, self._with_ahead = capacity, capacity + Capacity(ahead, 0)
        self._long_limit = limit = _for_long_ones(capacity)
        self._interactive: _Class[T] = _Class(self._with_ahead, limit, is_batch=False)
        # Batch's long ones may take all of its steps: whatever length is served is served as batch, too
        long_limit = Capacity(for_long_sentences(limit.rows), limit.steps)
        self._batch: _Class[T] = _Class(limit, long_limit, is_batch=True)
        self._classes = {Priority.INTERACTIVE: self._interactive, Priority.BATCH: self._batch}
        self._turn_share, self._round_share = BatchShare(batch_share), BatchShare(batch_share)
        self._few = max(1, capacity.rows // _FEW_PARTS)
        self._rows = self._steps = self._turns = 0

    def __bool__(self) -> bool:
        """Whether any sentence waits."""
        return bool(self._interactive or self._batch)

    def __len__(self) -> int:
        """Sentences that wait."""
        return len(self._interactive) + len(self._batch)

    def waiting(self, priority: Priority) -> int:
        """Return how many sentences of a priority wait."""
        return len(self._classes[priority])

    def rows(self, priority: Priority) -> int:
        """Return how many rows sentences of a priority take."""
        return self._classes[priority].rows

    @property
    def used(self) -> Capacity:
        """What is taken."""
        return Capacity(self._rows, self._steps)

    def ever_fits(self, need: Capacity, priority: Priority = Priority.INTERACTIVE) -> bool:
        """Return whether a sentence that needs so much could join if nothing else had."""
        if priority is Priority.BATCH or need.steps > LONG_STEPS:
            return self._long_limit.fits(need)
        return self._with_ahead.fits(need)

    def add(
        self,
        item: T,
        caller: Hashable,
        need: Capacity,
        deadline_s: float,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """Let a sentence wait, until the deadline on the clock that `decide` is given."""
        self._turns += 1
        lane = self._classes[priority].lane(need.steps)
        lane.add(caller, item, (need.rows, need.steps, deadline_s), self._turns)

    def remove(self, item: T, caller: Hashable) -> bool:
        """Take out one waiting sentence of a caller; return whether it was waiting."""
        return any(lane.remove(caller, item) for lane in self._lanes())

    def release(self, need: Capacity, priority: Priority = Priority.INTERACTIVE) -> None:
        """Give back the capacity of a sentence that has left the engine."""
        self._take(self._classes[priority].lane(need.steps), -need.rows, -need.steps)

    def decide(self, now_s: float) -> Decision[T]:
        """Take out the sentences that join now."""
        items: list[T] = []
        expired: list[T] = []
        while (turn := self._next_turn(now_s)) is not None:
            self._turns += 1
            item = turn.lane.pop(self._turns)
            if turn.expired:
                expired.append(item)
                continue
            self._take(turn.lane, turn.rows, turn.steps)
            self._count_turn(turn.lane)
            items.append(item)
        return Decision(tuple(items), tuple(expired))

    def leaves_batch_out(self) -> bool:
        """Return whether the round that begins now is to leave batch sentences out; once for each round."""
        share, rows = self._round_share, self._interactive.rows
        if not (rows and self._batch.rows):
            share.forget()  # so that an interactive sentence that joins runs at once
            return False
        if share.due:
            share.taken()
            return False
        share.passed(max(_LEAST_WEIGHT, (self._few / rows) ** 2))
        return True

    def drain(self) -> tuple[T, ...]:
        """Take out everything that waits."""
        items: list[T] = []
        for lane in self._lanes():
            while lane.queues:
                items.append(lane.pop(self._turns))
        return tuple(items)

    def _next_turn(self, now_s: float) -> _Turn[T] | None:
        """Return the head that is to be taken out; None if all must wait."""
        whole = self._with_ahead
        free_rows, free_steps = whole.rows - self._rows, whole.steps - self._steps
        if self._batch.short.queues or self._batch.long.queues:
            turn = self._batch_turn(now_s, free_rows, free_steps)
            if turn is not None and turn.fits:
                return turn
            if turn is not None:
                free_rows, free_steps = free_rows - turn.rows, free_steps - turn.steps
        turn = self._interactive.next_turn(now_s, free_rows, free_steps)
        return turn if turn is not None and turn.fits else None

    def _batch_turn(self, now_s: float, free_rows: int, free_steps: int) -> _Turn[T] | None:
        """Return batch's head, where it may join now, or where capacity is kept for it until it fits."""
        batch, limit = self._batch, self._long_limit
        turn = batch.next_turn(now_s, limit.rows - batch.rows, limit.steps - batch.steps)
        if turn is None or turn.expired or not turn.fits:
            return turn if turn is not None and turn.expired else None
        waited_for = self._waits_for_batch()
        due = self._turn_share.due and (waited_for is None or turn.since < waited_for)
        if not due:
            if self._interactive:
                return None
            free_rows -= self._with_ahead.rows - self._capacity.rows
        fits = turn.rows <= free_rows and turn.steps <= free_steps
        return turn._replace(fits=fits) if fits or due else None

    def _waits_for_batch(self) -> int | None:
        """Return since when a long interactive sentence waits for nothing but what batch holds; None: none does."""
        lane = self._interactive.long
        if not lane.queues:
            return None
        queue = lane.first()[1]
        rows, steps, _ = next(iter(queue.entries.values()))
        blocked = not lane.fits(rows, steps, lane.limit) and lane.fits(rows, steps, self._long_limit)
        return queue.since if blocked else None

    def _take(self, lane: _Lane[T], rows: int, steps: int) -> None:
        lane.rows += rows
        lane.steps += steps
        self._rows += rows
        self._steps += steps
        if lane.is_batch:
            used = Capacity(self._batch.rows, self._batch.steps)
            self._interactive.long.limit = _for_long_ones(self._capacity - used)

    def _count_turn(self, lane: _Lane[T]) -> None:
        if lane.is_batch:
            self._turn_share.taken()
        elif self._batch.short.queues or self._batch.long.queues:
            self._turn_share.passed()
        else:
            self._turn_share.forget()

    def _lanes(self) -> Sequence[_Lane[T]]:
        return self._interactive.short, self._interactive.long, self._batch.short, self._batch.long


def _for_long_ones(capacity: Capacity) -> Capacity:
    return Capacity(for_long_sentences(capacity.rows), for_long_sentences(capacity.steps))
