"""Which sentences next. Pure: no gRPC, no torch, no clock of its own."""

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Batch(Generic[T]):
    """What to do next.

    Attributes:
        items: to compute together.
        expired: whose deadline has passed; not to be computed.
    """

    items: tuple[T, ...]
    expired: tuple[T, ...]


@dataclass(frozen=True)
class _Entry(Generic[T]):
    item: T
    rows: int
    deadline_s: float


class Scheduler(Generic[T]):
    """Callers take turns, oldest caller first, one sentence a turn, until the batch is full.

    So a caller with one sentence waits for one sentence of every other caller at most, and not for a caller with a
    thousand; and as nobody is passed over, nobody starves. There is no waiting for a batch to fill: whoever asks
    gets what is there.
    """

    def __init__(self, max_batch_rows: int) -> None:
        """Sets the limit: rows (tokens and boundaries) of a batch; a single sentence may be longer."""
        self._max_batch_rows = max_batch_rows
        self._queues: OrderedDict[Hashable, deque[_Entry[T]]] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether any sentence waits."""
        return bool(self._queues)

    def add(self, item: T, caller: Hashable, rows: int, deadline_s: float) -> None:
        """Lets a sentence of so many rows wait, until the deadline on the clock that `next_batch` is given."""
        self._queues.setdefault(caller, deque()).append(_Entry(item, rows, deadline_s))

    def discard(self, caller: Hashable) -> None:
        """Takes out all sentences of a caller that waits no more."""
        self._queues.pop(caller, None)

    def next_batch(self, now_s: float) -> Batch[T]:
        """Takes the next batch out; empty only if nothing waits that can still be of use."""
        items: list[T] = []
        expired: list[T] = []
        rows = 0
        while self._queues:
            caller, queue = next(iter(self._queues.items()))
            entry = queue[0]
            late = entry.deadline_s <= now_s
            if not late and items and rows + entry.rows > self._max_batch_rows:
                break
            queue.popleft()
            (expired if late else items).append(entry.item)
            rows += 0 if late else entry.rows
            self._end_turn(caller)
        return Batch(tuple(items), tuple(expired))

    def _end_turn(self, caller: Hashable) -> None:
        if self._queues[caller]:
            self._queues.move_to_end(caller)
        else:
            del self._queues[caller]
