"""What only the asynchronous client has: tasks, cancellation, asynchronous input."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from bilm_client import AsyncClient, ClientClosedError
from bilm_client.testing.service import FakeStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from bilm_api.v1 import embed_pb2 as pb

    from tests.support.scripted import Scripted


async def test_many_tasks_share_a_client(scripted: Scripted) -> None:
    async with AsyncClient(scripted.target) as client:
        results = await asyncio.gather(*(client.embed([[f"t{n}"]]) for n in range(64)))
    assert [one[0].tokens for one in results] == [(f"t{n}",) for n in range(64)]


async def test_results_come_before_the_input_ends(scripted: Scripted) -> None:
    more = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        await more.wait()
        yield "b"

    async with AsyncClient(scripted.target) as client, aclosing(client.embed_stream(source())) as results:
        assert (await anext(results)).tokens == ("a",)
        more.set()
        assert [one.tokens async for one in results] == [("b",)]


async def test_cancelling_a_task_cancels_its_call(scripted: Scripted) -> None:
    hold = scripted.hold_next()
    async with AsyncClient(scripted.target) as client:
        task = asyncio.ensure_future(client.embed("a"))
        await asyncio.to_thread(hold.arrived.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hold.released.set()
        assert (await client.embed("a"))[0].tokens == ("a",)


async def test_closing_ends_calls_under_way_without_cancelling_tasks(scripted: Scripted) -> None:
    hold = scripted.hold_next()
    client = AsyncClient(scripted.target)
    task = asyncio.ensure_future(client.embed("a"))
    await asyncio.to_thread(hold.arrived.wait, 10)
    await client.close()
    with pytest.raises(ClientClosedError):
        await task
    hold.released.set()


async def test_leaving_a_stream_cancels_it_and_its_threads_end(
    scripted: Scripted, threads_before: set[threading.Thread]
) -> None:
    ended = threading.Event()

    def watched(requests: Iterator[pb.EmbedStreamRequest], context: Any) -> Iterator[pb.EmbedStreamResponse]:
        context.add_callback(ended.set)
        stream = FakeStream(scripted.service.fake, next(requests).start)
        yield stream.answer(next(requests).item)
        ended.wait(60)  # the end of the requests alone must not be what ends the call

    async def endless() -> AsyncIterator[str]:
        while True:
            yield "a"

    scripted.service.stream_acts.append(watched)
    async with AsyncClient(scripted.target) as client:
        async with aclosing(client.embed_stream(endless(), window=3)) as results:
            await anext(results)
        assert await asyncio.to_thread(ended.wait, 10)
        readers = [t for t in set(threading.enumerate()) - threads_before if t.name == "bilm-stream-reader"]
        for thread in readers:
            await asyncio.to_thread(thread.join, 10)
        assert not any(thread.is_alive() for thread in readers)


async def test_an_error_of_asynchronous_input_reaches_the_caller(scripted: Scripted) -> None:
    class AsyncReadError(Exception):
        pass

    async def source() -> AsyncIterator[str]:
        yield "a"
        raise AsyncReadError

    async with AsyncClient(scripted.target) as client:
        with pytest.raises(AsyncReadError):
            [one async for one in client.embed_stream(source())]
        with pytest.raises(TypeError, match="must be an iterable of sentences, got int"):
            client.embed_stream(7)  # type: ignore[call-overload]
