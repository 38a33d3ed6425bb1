"""Drives a stream session in an event loop: reads the caller's input and the server's messages side by side."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

from bilm_client._core.inputs import Input
from bilm_client._core.job import Outcome
from bilm_client._core.session import ResumableSession
from bilm_client._core.settings import ResultTimeout
from bilm_client._transport.base import Delivery, Interruption, StreamConnection, StreamOpener
from bilm_client._transport.open_streams import StreamOwner
from bilm_client.errors import BilmError, ServiceError


class AsyncStream:
    """A session, its input and its present connection.

    Between two results there is no task of its own unless the input is asynchronous: a loop that never runs again, as
    at the end of a script, would complain about it.

    Arguments are those of `SyncStream`; `inputs` may be asynchronous.
    """

    def __init__(
        self,
        session: ResumableSession,
        inputs: Iterator[Input] | AsyncIterator[Input],
        *,
        open_stream: StreamOpener,
        wait: Callable[[float], Awaitable[object]],
        timeout: ResultTimeout,
        learn: Callable[[], Awaitable[object]],
        failed: Callable[[ServiceError], None] = lambda _error: None,
    ) -> None:
        self._session = session
        self._inputs = inputs
        self._open_stream = open_stream
        self._wait = wait
        self._timeout = timeout
        self._learn = learn
        self._failed = failed
        self._connection: StreamConnection | None = None
        self._mailbox: _Mailbox | None = None
        self._pulling: asyncio.Task[Input] | None = None

    async def run(self) -> AsyncGenerator[Outcome, None]:
        """Yield the results in input order; closing the generator cancels the call."""
        owner = StreamOwner()
        try:
            while not self._session.finished:
                owner.check()
                await self._receive()
                await self._pull()
                outcome = self._session.take()
                if outcome is not None:
                    self._timeout.reset()
                    yield outcome
                elif not self._session.finished:
                    await self._step()
            await self._finish()
        finally:
            await self._stop()

    def __del__(self) -> None:
        self._disconnect()  # of a generator that was dropped after its loop's end, no `finally` runs

    async def _pull(self) -> None:
        """Take a sentence in, if there is one and the session accepts it."""
        if isinstance(self._inputs, AsyncIterator):
            await self._pull_asynchronously(self._inputs)
        elif self._session.accepts_input:
            try:
                source = next(self._inputs)
            except StopIteration:
                self._end_input()
            else:
                await self._add(source)

    async def _pull_asynchronously(self, inputs: AsyncIterator[Input]) -> None:
        if self._pulling is not None and self._pulling.done():
            task, self._pulling = self._pulling, None
            try:
                source = task.result()
            except StopAsyncIteration:
                self._end_input()
            else:
                await self._add(source)
        if self._pulling is None and self._session.accepts_input:
            self._pulling = asyncio.ensure_future(_next(inputs))

    async def _add(self, source: Input) -> None:
        if self._session.must_learn(source):
            await self._learn()
        message = self._session.add(source)
        if self._connection is None:
            self._open()
        else:
            self._connection.send(message)

    def _end_input(self) -> None:
        self._session.ended = True
        if self._connection is not None:
            self._connection.half_close()

    async def _step(self) -> None:
        """Wait for a sentence or a message; only let others run where a sentence can be had at once."""
        if self._session.accepts_input and self._pulling is None:
            await asyncio.sleep(0)
            return
        waits: set[asyncio.Future[None] | asyncio.Task[Input]] = set()
        if self._pulling is not None:
            waits.add(self._pulling)
        timeout_s = None
        if self._session.awaiting and self._mailbox is not None:
            waits.add(self._mailbox.arrival())
            timeout_s = self._timeout.remaining_s()
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

    async def _receive(self) -> None:
        """Take what has come; after a break, wait as the session says and connect anew."""
        try:
            while self._mailbox is not None and (delivery := self._mailbox.take()) is not None:
                if isinstance(delivery, BilmError):
                    raise delivery
                if isinstance(delivery, Interruption):
                    self._disconnect()
                    break
                self._session.receive(delivery)
                self._timeout.reset()
        except ServiceError as error:
            self._disconnect()
            if self._session.awaiting:  # else all that was due is here, and the stream's end may have come right behind
                self._failed(error)
                await self._wait(self._timeout.pause_s(self._session.broken(error), error))
        if self._session.awaiting and self._connection is None:
            self._open()

    def _open(self) -> None:
        self._mailbox = _Mailbox()  # what an earlier connection still delivers must not be taken for this one's
        opening = self._session.opening()
        self._connection = self._open_stream(opening, self._mailbox.deliver, self._timeout.deadline)
        if self._session.ended:
            self._connection.half_close()

    async def _finish(self) -> None:
        # The last result is here; let the server end the call in good order rather than see it cancelled.
        if self._connection is not None and self._mailbox is not None:
            await asyncio.wait({self._mailbox.arrival()}, timeout=1.0)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection, self._mailbox = None, None

    async def _stop(self) -> None:
        self._disconnect()
        if self._pulling is not None:
            self._pulling.cancel()
            await asyncio.gather(self._pulling, return_exceptions=True)


class _Mailbox:
    """Hands what the reader thread of one connection delivers to an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliveries: deque[Delivery] = deque()
        self._arrival: asyncio.Future[None] | None = None

    def deliver(self, delivery: Delivery) -> None:
        """Put something in, from any thread."""
        with suppress(RuntimeError):  # the loop has closed: nothing waits any more
            self._loop.call_soon_threadsafe(self._put, delivery)

    def take(self) -> Delivery | None:
        """Return the oldest delivery, or None."""
        return self._deliveries.popleft() if self._deliveries else None

    def arrival(self) -> "asyncio.Future[None]":
        """Return a future that is done once there is a delivery."""
        if self._arrival is None or self._arrival.done():
            self._arrival = self._loop.create_future()
            if self._deliveries:
                self._arrival.set_result(None)
        return self._arrival

    def _put(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


async def _next(inputs: AsyncIterator[Input]) -> Input:
    return await anext(inputs)
