"""Drives a stream session in an event loop: reads the caller's input and the server's messages side by side."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress

from bilm_api.v1 import embed_pb2 as pb

from bilm_client._connection import Connect, Connection, Delivery, Translate
from bilm_client._inputs import Input
from bilm_client._job import Outcome
from bilm_client._session import StreamSession
from bilm_client._settings import Patience
from bilm_client.errors import BilmError, ServiceError


class AsyncStream:
    """A session, its input and its present connection."""

    def __init__(
        self,
        session: StreamSession,
        inputs: AsyncIterator[Input],
        *,
        connect: Connect,
        translate: Translate,
        sleep: Callable[[float], Awaitable[object]],
        patience: Patience,
    ) -> None:
        self._session = session
        self._inputs = inputs
        self._connect = connect
        self._translate = translate
        self._sleep = sleep
        self._patience = patience
        self._connection: Connection | None = None
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._pulling: asyncio.Task[Input] | None = None
        self._reading: asyncio.Task[pb.EmbedStreamResponse] | None = None

    async def run(self) -> AsyncGenerator[Outcome, None]:
        """Yield the results in input order; closing the generator cancels the call."""
        try:
            while not self._session.finished:
                self._start_tasks()
                outcome = self._session.take()
                if outcome is not None:
                    self._patience.reset()
                    yield outcome
                elif not self._session.finished:
                    await self._step()
            await self._finish()
        finally:
            await self._stop()

    def _start_tasks(self) -> None:
        if self._pulling is None and self._session.room:
            self._pulling = asyncio.ensure_future(_next(self._inputs))
        if self._session.awaiting:
            if self._connection is None:
                self._open()
            if self._reading is None and self._connection is not None:
                self._reading = asyncio.ensure_future(self._read())

    async def _step(self) -> None:
        tasks = {task for task in (self._pulling, self._reading) if task is not None}
        timeout_s = self._patience.remaining_s() if self._session.awaiting else None
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._pulling in done:
            self._take_input()
        if self._reading in done:
            await self._take_message()

    def _take_input(self) -> None:
        task, self._pulling = self._pulling, None
        assert task is not None  # noqa: S101 - the caller looked
        try:
            message = self._session.add(task.result())
        except StopAsyncIteration:
            self._session.ended = True
            if self._connection is not None:
                self._connection.half_close()
            return
        if self._connection is not None:
            self._connection.send(message)

    async def _take_message(self) -> None:
        task, self._reading = self._reading, None
        assert task is not None  # noqa: S101 - the caller looked
        try:
            self._session.receive(task.result())
            self._patience.reset()
        except ServiceError as error:
            self._disconnect()
            await self._sleep(self._patience.pause_s(self._session.broken(error), error))

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        # A new queue: what an earlier connection still delivers must not be taken for this one's.
        deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._deliveries = deliveries

        def deliver(delivery: Delivery) -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(deliveries.put_nowait, delivery)

        self._connection = Connection(self._connect, self._translate, self._session.opening(), deliver)
        if self._session.ended:
            self._connection.half_close()

    async def _read(self) -> pb.EmbedStreamResponse:
        delivery = await self._deliveries.get()
        if isinstance(delivery, BilmError):
            raise delivery
        if self._connection is not None:
            self._connection.taken()
        return delivery

    async def _finish(self) -> None:
        # The last result is here; let the server end the call in good order rather than see it cancelled.
        if self._connection is not None and self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
            await asyncio.wait({self._reading}, timeout=1.0)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _stop(self) -> None:
        self._disconnect()
        tasks = [task for task in (self._pulling, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _next(inputs: AsyncIterator[Input]) -> Input:
    return await anext(inputs)
