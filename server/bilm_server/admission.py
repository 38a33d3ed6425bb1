"""How much work is let in: bounded by tokens and by the bytes of the answers, so that memory is, too."""

import asyncio
from collections import deque
from dataclasses import dataclass

from bilm_server.errors import Reason, RefusalError


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes up.

    Attributes:
        tokens: to compute.
        answer_bytes: to hold until they are sent.
    """

    tokens: int
    answer_bytes: int


class Admission:
    """Room for work; used from the event loop only."""

    def __init__(self, max_tokens: int, max_answer_bytes: int) -> None:
        self.capacity = Cost(max_tokens, max_answer_bytes)
        """What there is room for."""
        self._used = Cost(0, 0)
        self._waiting: deque[tuple[Cost, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> Cost:
        """What is in."""
        return self._used

    def check(self, least: Cost, retry_after_ms: int) -> None:
        """Refuses what is sure not to fit, before its whole cost is known.

        Raises:
            RefusalError: OVERLOADED with the given pushback, if there is no room for even that now.
        """
        if self._waiting or not self._fits(least):
            raise RefusalError(Reason.OVERLOADED, "too much work is waiting already; try again", retry_after_ms)

    def take(self, cost: Cost, retry_after_ms: int) -> None:
        """Takes room; give it back with `release`, all at once or bit by bit.

        Raises:
            RefusalError: OVERLOADED with the given pushback, if there is no room now.
        """
        self.check(cost, retry_after_ms)
        self._take(cost)

    async def acquire(self, cost: Cost) -> None:
        """Waits for room, first come, first served; give it back with `release`.

        Raises:
            RefusalError: RESPONSE_TOO_LARGE, if there can never be so much.
        """
        if cost.tokens > self.capacity.tokens or cost.answer_bytes > self.capacity.answer_bytes:
            raise RefusalError(Reason.RESPONSE_TOO_LARGE, f"the answer has {cost.answer_bytes} bytes, more than fit")
        if not self._waiting and self._fits(cost):
            self._take(cost)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((cost, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(cost)  # it was let in at the very moment it gave up
            self._let_in()
            raise

    def release(self, cost: Cost) -> None:
        """Gives room back."""
        self._used = Cost(self._used.tokens - cost.tokens, self._used.answer_bytes - cost.answer_bytes)
        self._let_in()

    def _fits(self, cost: Cost) -> bool:
        return (
            self._used.tokens + cost.tokens <= self.capacity.tokens
            and self._used.answer_bytes + cost.answer_bytes <= self.capacity.answer_bytes
        )

    def _take(self, cost: Cost) -> None:
        self._used = Cost(self._used.tokens + cost.tokens, self._used.answer_bytes + cost.answer_bytes)

    def _let_in(self) -> None:
        while self._waiting:
            cost, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(cost):
                    return
                self._take(cost)
                turn.set_result(None)
            self._waiting.popleft()
