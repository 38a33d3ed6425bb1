"""One EmbedStream on a fake engine, without gRPC: requests come from a queue, responses go to a list."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import Capacity
from bilm_server.embedding.admission import Cost
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.registry import Registry
from bilm_server.errors import CallerGoneError, Code, RefusalError
from bilm_server.inference.types import Call, Sentence
from bilm_server.observability.call_record import CallRecord
from bilm_server.protocols.embed_v1.stream import StreamHandler

from tests.support.embedders import LIMITS, embedding, entered, until, worker_of
from tests.support.fake_engine import FakeEngine
from tests.support.served import tokens

Response = embed_pb2.EmbedStreamResponse


class StreamClient:
    """Sends what the test says, and keeps what it gets; `reads` cleared, it reads nothing more."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.requests: asyncio.Queue[embed_pb2.EmbedStreamRequest | None] = asyncio.Queue()
        self.read = 0
        self.reads = asyncio.Event()
        self.reads.set()
        self.gone = False

    def start(self, **fields: Any) -> None:
        self.requests.put_nowait(embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(**fields)))

    def send(self, item_id: int, *words: str, **fields: Any) -> None:
        item = embed_pb2.StreamItem(id=item_id, sentence=tokens(*words, **fields))
        self.requests.put_nowait(embed_pb2.EmbedStreamRequest(item=item))

    def finish(self) -> None:
        self.requests.put_nowait(None)

    async def write(self, response: Response) -> None:
        if self.gone:
            raise grpc.aio.InternalError
        await self.reads.wait()
        self.responses.append(response)

    async def __aiter__(self) -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
        while (request := await self.requests.get()) is not None:
            self.read += 1
            yield request

    @property
    def ids(self) -> list[int]:
        return [response.id for response in self.responses]


class HandledStream:
    """A stream under way."""

    def __init__(self, embedder: Embedder, stall_s: float) -> None:
        self.embedder, self.client, self.record = embedder, StreamClient(), CallRecord("EmbedStream", "peer")
        handler = StreamHandler(
            Registry(embedder.limits, embedder.conversions, [embedder]), Call(), self.client.write, stall_s
        )
        with entered(self.record):
            self.task = asyncio.create_task(handler.run(aiter(self.client)))

    async def error(self) -> BaseException | None:
        await asyncio.wait([self.task], timeout=60)
        return self.task.exception()

    async def reason(self) -> Reason:
        error = await self.error()
        assert isinstance(error, RefusalError), error
        return error.reason


@asynccontextmanager
async def stream(
    engine: FakeEngine[Sentence], *, stall_s: float = 60.0, **settings: Any
) -> AsyncIterator[HandledStream]:
    async with embedding(engine, **settings) as embedder:
        found = HandledStream(embedder, stall_s)
        try:
            yield found
        finally:
            engine.go_on.set()
            found.task.cancel()
            await asyncio.wait([found.task])


def engine(rows: int = 64) -> FakeEngine[Sentence]:
    return FakeEngine(Capacity(rows, 10_000))


async def test_items_are_answered_as_soon_as_each_is_ready() -> None:
    async with stream(engine()) as found:
        found.client.start()
        found.client.send(1, *["a"] * 50)
        found.client.send(2, "b")
        await until(lambda: found.client.ids == [2, 1])
        found.client.finish()
        assert await found.error() is None
    assert (found.record.sentences, found.record.failed_sentences, found.record.tokens) == (2, 0, 51)


async def test_no_more_items_are_read_than_may_be_in_flight() -> None:
    slow = engine()
    async with stream(slow) as found:
        slow.go_on.clear()
        found.client.start()
        for number in range(3 * LIMITS.stream_items):
            found.client.send(number, "a")
        await until(lambda: worker_of(found.embedder).pending == LIMITS.stream_items)
        assert found.client.read == 1 + LIMITS.stream_items
        slow.go_on.set()
        found.client.finish()
        assert await found.error() is None
        assert sorted(found.client.ids) == list(range(3 * LIMITS.stream_items))


async def test_items_hold_their_room_until_they_are_sent() -> None:
    async with stream(engine()) as found:
        found.client.reads.clear()
        found.client.start()
        for number in range(LIMITS.stream_items):
            found.client.send(number, "a", "b")
        await until(lambda: worker_of(found.embedder).pending == 0 and found.client.read == 1 + LIMITS.stream_items)
        assert found.embedder.stream_admission.used.tokens == 2 * LIMITS.stream_items
        found.client.reads.set()
        await until(lambda: found.embedder.stream_admission.used == Cost(0, 0))


@pytest.mark.parametrize("carry", [False, True])
async def test_a_bad_item_costs_the_others_nothing(carry: bool) -> None:
    async with stream(engine()) as found:
        found.client.start(carry_state=carry)
        found.client.send(1, "a")
        found.client.send(2, "")
        found.client.send(3, "poison")
        found.client.send(4, "b")
        found.client.finish()
        assert await found.error() is None
    by_id = {response.id: response for response in found.client.responses}
    assert [by_id[number].WhichOneof("outcome") for number in (1, 2, 3, 4)] == ["rows", "error", "error", "rows"]
    assert (found.record.sentences, found.record.failed_sentences) == (4, 2)


async def test_an_id_may_be_used_again_once_its_result_was_sent() -> None:
    async with stream(engine()) as found:
        found.client.start()
        for count in (1, 2, 3):
            found.client.send(7, "a")
            await until(lambda count=count: len(found.client.responses) == count)  # type: ignore[misc]
        found.client.send(7, "")
        await until(lambda: len(found.client.responses) == 4)
        found.client.send(7, "a")
        found.client.finish()
        assert await found.error() is None


async def test_an_id_that_is_in_use_ends_the_stream() -> None:
    slow = engine()
    async with stream(slow) as found:
        slow.go_on.clear()
        found.client.start()
        found.client.send(7, "a")
        found.client.send(7, "b")
        assert await found.reason() is Reason.ID_IN_USE


@pytest.mark.parametrize("first", ["item", "nothing", "start twice"])
async def test_messages_out_of_order_end_the_stream(first: str) -> None:
    async with stream(engine()) as found:
        if first == "item":
            found.client.send(1, "a")
        if first == "start twice":
            found.client.start()
            found.client.start()
        found.client.finish()
        assert await found.reason() is Reason.STREAM_ORDER


async def test_a_failing_engine_ends_the_stream_and_fails_no_item() -> None:
    fails = engine()
    async with stream(fails) as found:
        found.client.start()
        fails.broken = 1
        found.client.send(1, "a")
        error = await found.error()
        assert isinstance(error, RefusalError)
        assert (error.reason, error.code) == (Reason.MODEL_FAILING, Code.UNAVAILABLE)
    assert found.client.responses == []
    assert found.record.failed_sentences == 0


async def test_a_client_that_reads_nothing_ends_the_stream() -> None:
    async with stream(engine(), stall_s=0.01) as found:
        found.client.reads.clear()
        found.client.start()
        for number in range(LIMITS.stream_items):
            found.client.send(number, "a")
        assert await found.reason() is Reason.STREAM_STALLED
    assert found.client.responses == []


async def test_a_client_that_has_left_ends_the_stream() -> None:
    async with stream(engine()) as found:
        found.client.gone = True
        found.client.start()
        found.client.send(1, "a")
        assert isinstance(await found.error(), CallerGoneError)


@pytest.mark.parametrize("carry", [False, True])
async def test_a_stream_that_is_cancelled_leaves_nothing(carry: bool) -> None:
    slow = engine(rows=1)
    async with stream(slow) as found:
        slow.go_on.clear()
        found.client.start(carry_state=carry)
        for number in range(LIMITS.stream_items):
            found.client.send(number, "a", "b")
        n_pending = 1 if carry else LIMITS.stream_items
        await until(lambda: worker_of(found.embedder).pending == n_pending)
        found.task.cancel()
        await asyncio.wait([found.task])
        await asyncio.sleep(0)
        assert found.embedder.stream_admission.used == Cost(0, 0)
        assert worker_of(found.embedder).pending == 0


async def test_carried_items_are_answered_in_order_and_continue_from_one_another() -> None:
    async with stream(engine()) as found:
        found.client.start(carry_state=True, return_state_every=2)
        for number in range(5):
            found.client.send(number, "a", return_state=number == 4)
        found.client.finish()
        assert await found.error() is None
    assert found.client.ids == [0, 1, 2, 3, 4]
    states = [response.rows.embedding.state for response in found.client.responses]
    assert [int.from_bytes(state, "little") for state in states] == [0, 2, 0, 4, 5]  # none for 1st and 3rd


async def test_a_failed_item_leaves_the_carried_state_as_it_was() -> None:
    async with stream(engine()) as found:
        found.client.start(carry_state=True)
        found.client.send(1, "a", "b")
        found.client.send(2, "poison")
        found.client.send(3, "c", return_state=True)
        found.client.finish()
        assert await found.error() is None
    assert int.from_bytes(found.client.responses[-1].rows.embedding.state, "little") == 3
