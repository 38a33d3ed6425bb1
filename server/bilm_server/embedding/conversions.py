"""Convert what is large in threads, so that the event loop stays free; what waits for them is bounded.

Handing a conversion to a thread and back takes 0.1 ms of the event loop and wakes two threads, so what takes hardly
longer than that is done at once. Both sides count bytes, weighted by what they take.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TypeVar

from bilm_api.constants import Priority, Reason

from bilm_server.embedding.admission import pushback_ms
from bilm_server.errors import RefusalError
from bilm_server.limits import for_batch

R = TypeVar("R")

INLINE_BYTES = 4 * 1024
"""Weighted bytes of a request that is converted at once: a KiB of text, or 32 KiB of tokens; 1.3 ms."""

INLINE_RESPONSE_BYTES = 128 * 1024
"""Bytes of a response that is built at once: 32 pooled sentences of 1,024 numbers, 0.1 ms."""

TOKENISING_WEIGHT = 4
"""A byte of text counts as so many: tokenising takes 1.3 ms for a KiB."""

_TOKENS_SHARE = 8
"""So many bytes of a request without text count as one: checking tokens takes 0.03 ms for a KiB."""

_RESPONSE_SHARE = 64
"""So many bytes of a response count as one; that is generous, as a message of 16 MiB takes 15 ms and counts as 80."""

_SECONDS_PER_BYTE = 1.3e-3 / 1024 / TOKENISING_WEIGHT
_MAX_WAITING_BYTES = 4 * 2**20
"""Weighted, about 1.3 s of work: from there on requests are refused. One that begins below may go above, however large
it is, so that small requests never keep a large one out."""

_THREADS = 2


def request_weight(n_bytes: int, n_text_bytes: int) -> int:
    """Return what counts of a request of so many bytes, so many of which are to be tokenised."""
    return max(n_bytes // _TOKENS_SHARE, TOKENISING_WEIGHT * n_text_bytes)


class Conversions:
    """Threads for conversions; used from the event loop only.

    A request that finds too much waiting is refused. A stream's item waits for its turn instead, and has no part in
    what requests find waiting, as everywhere else. A response is never refused, since its work is done; but it counts.

    Batch work takes one thread at a time, so that interactive work never waits behind more than one piece of it, and
    batch requests are refused when it makes up three quarters of what may wait.

    A conversion that is cancelled while it waits is dropped.
    """

    def __init__(self, max_waiting_bytes: int = _MAX_WAITING_BYTES) -> None:
        """Set the bound; threads start with the first conversion.

        Args:
            max_waiting_bytes: weighted bytes of requests and responses from which on further requests are refused.
        """
        self._max_waiting_bytes = max_waiting_bytes
        self._threads = ThreadPoolExecutor(_THREADS, "conversion")
        self._items = asyncio.Semaphore(_THREADS)  # first come, first served
        self._batch_turn = asyncio.Semaphore(1)
        self._waiting_bytes = self._batch_bytes = 0

    @property
    def waiting_bytes(self) -> int:
        """Weighted bytes of requests and responses being converted or waiting for it."""
        return self._waiting_bytes

    async def request(self, weight: int, function: Callable[[], R], priority: Priority = Priority.INTERACTIVE) -> R:
        """Convert a request of a `request_weight`.

        Raises:
            RefusalError: OVERLOADED, if too much waits already.
        """
        if weight <= INLINE_BYTES:
            return function()
        too_much_batch = self._batch_bytes >= for_batch(self._max_waiting_bytes) and priority is Priority.BATCH
        if too_much_batch or self._waiting_bytes >= self._max_waiting_bytes:
            half_s = self._waiting_bytes * _SECONDS_PER_BYTE / 2
            raise RefusalError(Reason.OVERLOADED, "too many requests wait to be read; try again", pushback_ms(half_s))
        return await self._counted(weight, function, priority)

    async def item(self, weight: int, function: Callable[[], R], priority: Priority = Priority.INTERACTIVE) -> R:
        """Convert a stream's item of a `request_weight`, when its turn comes."""
        if weight <= INLINE_BYTES:
            return function()
        async with self._turn(priority), self._items:
            return await self._in_thread(function)

    async def response(self, n_bytes: int, function: Callable[[], R], priority: Priority = Priority.INTERACTIVE) -> R:
        """Convert results to a response of so many bytes."""
        if n_bytes <= INLINE_RESPONSE_BYTES:
            return function()
        return await self._counted(n_bytes // _RESPONSE_SHARE, function, priority)

    def stop(self) -> None:
        """Drop what waits; what runs is left to end by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _counted(self, weight: int, function: Callable[[], R], priority: Priority) -> R:
        batch_weight = weight if priority is Priority.BATCH else 0
        self._waiting_bytes += weight
        self._batch_bytes += batch_weight
        try:
            async with self._turn(priority):
                return await self._in_thread(function)
        finally:
            self._waiting_bytes -= weight
            self._batch_bytes -= batch_weight

    def _turn(self, priority: Priority) -> AbstractAsyncContextManager[None]:
        return self._batch_turn if priority is Priority.BATCH else nullcontext()

    async def _in_thread(self, function: Callable[[], R]) -> R:
        # Cancelling the future that is awaited here cancels the thread pool's, which then skips it
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)
