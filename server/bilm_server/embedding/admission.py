"""How much work is let in: bounded by tokens and by the bytes of responses, so that memory is, too.

Calls are refused where there is no room. Streams wait. A stream holds room from the moment when an item is let in until
its result has been sent, which takes as long as its client likes. A client that reads two streams in turns doesn't read
the first one while it waits for the second one. So no stream may take what others need for their first item: a stream
that holds something may fill half of the room, the other half is for streams that hold nothing.

Batch work may fill three quarters of each room, or have one piece in that is larger. Of streams it waits for room
behind interactive ones.

Everything here is used from the event loop only.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from bilm_api.constants import NEVER_RETRY, Priority, Reason

from bilm_server.errors import RefusalError
from bilm_server.limits import for_batch

_MIN_PUSHBACK_MS, _MAX_PUSHBACK_MS = 20, 10_000  # never 0: a gRPC client hangs on that until its deadline


def pushback_ms(seconds: float) -> int:
    """Return when to come back after a refusal, for what is expected to take so long."""
    return max(_MIN_PUSHBACK_MS, min(_MAX_PUSHBACK_MS, int(1000 * seconds)))


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes up.

    Attributes:
        tokens: to compute.
        response_bytes: to hold until they are sent.
    """

    tokens: int
    response_bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens + other.tokens, self.response_bytes + other.response_bytes)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens - other.tokens, self.response_bytes - other.response_bytes)

    def fits(self, other: "Cost") -> bool:
        """Return whether the other fits into this."""
        return other.tokens <= self.tokens and other.response_bytes <= self.response_bytes

    def for_batch(self) -> "Cost":
        """Return what of this room batch work may fill."""
        return Cost(for_batch(self.tokens), for_batch(self.response_bytes))


NOTHING = Cost(0, 0)


class Reservation:
    """Room that a piece of work holds; it gives itself back at the end of a `with` block, or by `release`.

    Attributes:
        cost: what is held.
        priority: of the work.
    """

    def __init__(
        self, cost: Cost, give_back: Callable[[Cost], None], priority: Priority = Priority.INTERACTIVE
    ) -> None:
        """Hold what has been taken already, and is given back by the given function."""
        self.cost, self.priority = cost, priority
        self._give_back: Callable[[Cost], None] | None = give_back

    @property
    def released(self) -> bool:
        """Whether it holds nothing any more, for good."""
        return self._give_back is None

    def release(self) -> None:
        """Give everything back; idempotent."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.cost)
            self.cost = NOTHING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """Room for calls, which are refused where there is none."""

    def __init__(self, max_tokens: int, max_response_bytes: int) -> None:
        """Set what there is room for."""
        self.capacity = Cost(max_tokens, max_response_bytes)
        """What there is room for."""
        self._tokens = self._response_bytes = 0
        self._for_batch, self._batch = self.capacity.for_batch(), NOTHING

    @property
    def used(self) -> Cost:
        """What is in."""
        return Cost(self._tokens, self._response_bytes)

    @property
    def used_tokens(self) -> int:
        """Tokens that are in."""
        return self._tokens

    @property
    def batch_tokens(self) -> int:
        """Tokens of batch calls that are in."""
        return self._batch.tokens

    def reserve(
        self, cost: Cost, retry_after_ms: Callable[[], int], priority: Priority = Priority.INTERACTIVE
    ) -> Reservation:
        """Take room, which the reservation gives back.

        Raises:
            RefusalError: OVERLOADED with the pushback that is returned then, if there is no room now.
        """
        give_back = self._give_batch_back if priority is Priority.BATCH else self._give_back
        room = Reservation(NOTHING, give_back, priority)
        self.resize(room, cost, retry_after_ms)
        return room

    def resize(
        self, reservation: Reservation, cost: Cost, retry_after_ms: Callable[[], int] = lambda: NEVER_RETRY
    ) -> None:
        """Let a reservation hold so much from now on; one that was released holds nothing.

        Raises:
            RefusalError: OVERLOADED with the pushback that is returned then, if that is more and there is no room for
                it now; then nothing has changed.
        """
        if not reservation.released:
            held = reservation.cost
            batch = reservation.priority is Priority.BATCH
            if batch:
                self._check_batch(held, cost, retry_after_ms)
            self._take(cost.tokens - held.tokens, cost.response_bytes - held.response_bytes, retry_after_ms)
            if batch:
                self._batch += cost - held
            reservation.cost = cost

    def _check_batch(self, held: Cost, cost: Cost, retry_after_ms: Callable[[], int]) -> None:
        """Refuse what is more than batch calls may hold, unless there is no other one."""
        others = self._batch - held
        if not held.fits(cost) and others != NOTHING and not self._for_batch.fits(others + cost):
            raise RefusalError(Reason.OVERLOADED, "too much batch work is waiting already; try again", retry_after_ms())

    def _take(self, more_tokens: int, more_bytes: int, retry_after_ms: Callable[[], int]) -> None:
        tokens, response_bytes = self._tokens + more_tokens, self._response_bytes + more_bytes
        fits = tokens <= self.capacity.tokens and response_bytes <= self.capacity.response_bytes
        if not fits and (more_tokens > 0 or more_bytes > 0):
            raise RefusalError(Reason.OVERLOADED, "too much work is waiting already; try again", retry_after_ms())
        self._tokens, self._response_bytes = tokens, response_bytes

    def _give_back(self, cost: Cost) -> None:
        self._tokens -= cost.tokens
        self._response_bytes -= cost.response_bytes

    def _give_batch_back(self, cost: Cost) -> None:
        self._batch -= cost
        self._give_back(cost)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An item that is not in yet."""

    cost: Cost
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Entrance:
    """Where streams of one priority wait for room.

    First come, first served among those that hold nothing, and among the others, which wait for the former.
    """

    def __init__(self, limit: Cost) -> None:
        """Set what all streams may hold together when one is let in here."""
        self.limit, self.limit_of_further = limit, Cost(limit.tokens // 2, limit.response_bytes // 2)
        self.first: dict[StreamShare, _Waiting] = {}
        self.further: dict[StreamShare, _Waiting] = {}

    def __len__(self) -> int:
        """Streams that wait."""
        return len(self.first) + len(self.further)


class StreamAdmission:
    """Room for the items of all streams, which wait where there is none."""

    def __init__(self, max_tokens: int, max_response_bytes: int) -> None:
        """Set what there is room for."""
        self.capacity = Cost(max_tokens, max_response_bytes)
        """What there is room for."""
        self._used = self._batch = NOTHING
        self._interactive, self._batches = _Entrance(self.capacity), _Entrance(self.capacity.for_batch())

    @property
    def used(self) -> Cost:
        """What all streams hold."""
        return self._used

    @property
    def batch_tokens(self) -> int:
        """Tokens that batch streams hold."""
        return self._batch.tokens

    @property
    def waiting(self) -> int:
        """Streams that wait for room."""
        return len(self._interactive) + len(self._batches)

    async def reserve(self, share: "StreamShare", cost: Cost) -> Reservation:
        """Wait for room for an item of a stream, which the reservation gives back; one item of it at a time.

        Raises:
            RefusalError: RESPONSE_TOO_LARGE, if there can never be so much.
        """
        if not self.capacity.fits(cost):
            raise RefusalError(
                Reason.RESPONSE_TOO_LARGE, f"the response has {cost.response_bytes} bytes, more than fit"
            )
        waiting, entrance = _Waiting(cost), self._entrance(share)
        (entrance.further if share.n_items else entrance.first)[share] = waiting
        self._let_in()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if not waiting.turn.cancelled():
                self._leave(share, cost)  # it was let in at the very moment it was cancelled
            else:
                self._let_in()
            raise
        return Reservation(cost, lambda _: self._leave(share, cost))

    def _leave(self, share: "StreamShare", cost: Cost) -> None:
        self._used -= cost
        if share.priority is Priority.BATCH:
            self._batch -= cost
        share.n_items -= 1
        entrance = self._entrance(share)
        if not share.n_items and (waiting := entrance.further.pop(share, None)):
            entrance.first[share] = waiting
        self._let_in()

    def _entrance(self, share: "StreamShare") -> _Entrance:
        return self._batches if share.priority is Priority.BATCH else self._interactive

    def _let_in(self) -> None:
        interactive, batch = self._interactive, self._batches
        self._let_in_from(interactive.first, interactive.limit)
        if interactive.first:
            return
        self._let_in_from(interactive.further, interactive.limit_of_further)
        # They have a quarter less, and so take nothing that the former wait for, but of streams that hold something
        self._let_in_from(batch.first, batch.limit)
        if not batch.first:
            self._let_in_from(batch.further, batch.limit_of_further)

    def _let_in_from(self, queue: "dict[StreamShare, _Waiting]", limit: Cost) -> None:
        while queue:
            share, waiting = next(iter(queue.items()))
            if not waiting.turn.done():
                if not limit.fits(self._used + waiting.cost) and not self._has_no_other_way(share, waiting.cost, limit):
                    return
                self._used += waiting.cost
                if share.priority is Priority.BATCH:
                    self._batch += waiting.cost
                share.n_items += 1
                waiting.turn.set_result(None)
            del queue[share]

    def _has_no_other_way(self, share: "StreamShare", cost: Cost, limit: Cost) -> bool:
        """Return whether a batch item that is larger than what batch may fill can be let in, as the only one."""
        alone = share.priority is Priority.BATCH and not share.n_items and self._batch == NOTHING
        return alone and not limit.fits(cost) and self.capacity.fits(self._used + cost)


class StreamShare:
    """What one stream holds.

    Attributes:
        n_items: Items that are in.
        priority: Of its items.
    """

    def __init__(self, max_items: int, priority: Priority = Priority.INTERACTIVE) -> None:
        """Hold nothing; the stream may have so many items in flight."""
        self._places = asyncio.Semaphore(max_items)
        self.n_items, self.priority = 0, priority

    async def place(self) -> Reservation:
        """Wait until the stream may have another item in flight, which the reservation is."""
        await self._places.acquire()
        return Reservation(NOTHING, lambda _: self._places.release())
