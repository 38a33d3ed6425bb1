"""How much of their results streams may hold: bounded for all of them together, and something for each.

A stream holds room from the moment when an item is let in until its result has been sent, which takes as long as its
caller likes. A caller that reads two streams in turns doesn't read the first one while it waits for the second one. So
no stream may take what others need for their first item: a stream that holds something may fill half of the room, the
other half is for streams that hold nothing.
"""

import asyncio
from dataclasses import dataclass, field

from bilm_api.constants import Reason

from bilm_server.admission import Cost
from bilm_server.errors import RefusalError


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An item that is not in yet."""

    cost: Cost
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StreamRoom:
    """Room for the items of all streams; used from the event loop only.

    First come, first served among the streams that hold nothing, and among the others, which wait for the former.
    """

    def __init__(self, max_tokens: int, max_answer_bytes: int) -> None:
        self.capacity = Cost(max_tokens, max_answer_bytes)
        """What there is room for."""
        self._shared = Cost(max_tokens // 2, max_answer_bytes // 2)
        self._used = Cost(0, 0)
        self._first: dict[Share, _Waiting] = {}
        self._further: dict[Share, _Waiting] = {}

    @property
    def used(self) -> Cost:
        """What all streams hold."""
        return self._used

    def share(self) -> "Share":
        """Return the share of one stream, which holds nothing yet."""
        return Share(self)

    async def enter(self, share: "Share", cost: Cost) -> None:
        """Wait for room; for `Share.acquire`."""
        if not _fits(cost, self.capacity):
            raise RefusalError(Reason.RESPONSE_TOO_LARGE, f"the answer has {cost.answer_bytes} bytes, more than fit")
        waiting = _Waiting(cost)
        (self._further if share.n_items else self._first)[share] = waiting
        self._let_in()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if not waiting.turn.cancelled():
                self.leave(share, cost)  # it was let in at the very moment it gave up
            else:
                self._let_in()
            raise

    def leave(self, share: "Share", cost: Cost) -> None:
        """Give room back; for `Share.release`."""
        self._used = Cost(self._used.tokens - cost.tokens, self._used.answer_bytes - cost.answer_bytes)
        share.n_items -= 1
        if not share.n_items and (waiting := self._further.pop(share, None)):
            self._first[share] = waiting
        self._let_in()

    def _let_in(self) -> None:
        self._let_in_from(self._first, self.capacity)
        if not self._first:
            self._let_in_from(self._further, self._shared)

    def _let_in_from(self, queue: "dict[Share, _Waiting]", limit: Cost) -> None:
        while queue:
            share, waiting = next(iter(queue.items()))
            if not waiting.turn.done():
                total = Cost(
                    self._used.tokens + waiting.cost.tokens, self._used.answer_bytes + waiting.cost.answer_bytes
                )
                if not _fits(total, limit):
                    return
                self._used = total
                share.n_items += 1
                waiting.turn.set_result(None)
            del queue[share]


class Share:
    """What one stream holds of the room.

    Attributes:
        n_items: Items that are in.
    """

    def __init__(self, room: StreamRoom) -> None:
        self._room = room
        self.n_items = 0

    async def acquire(self, cost: Cost) -> None:
        """Wait for room for an item, one after another; give it back with `release`.

        Raises:
            RefusalError: RESPONSE_TOO_LARGE, if there can never be so much.
        """
        await self._room.enter(self, cost)

    def release(self, cost: Cost) -> None:
        """Give the room of an item back."""
        self._room.leave(self, cost)


def _fits(cost: Cost, limit: Cost) -> bool:
    return cost.tokens <= limit.tokens and cost.answer_bytes <= limit.answer_bytes
