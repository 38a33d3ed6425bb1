"""One EmbedStream: reads items while there is room, answers each as soon as it is ready."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import State

from bilm_server import responses
from bilm_server.admission import Cost
from bilm_server.errors import CallerGoneError, Code, RefusalError
from bilm_server.jobs import Call, Job, Outcome
from bilm_server.observability.call_record import current_call
from bilm_server.parts import Parts
from bilm_server.protocols.grpc.status import status_of
from bilm_server.requests import PreparedSentence, Wanted, check_model, parse_options, prepare_sentence

Write = Callable[[embed_pb2.EmbedStreamResponse], Awaitable[None]]


class StreamSession:
    """The state of one stream."""

    def __init__(self, parts: Parts, call: Call, write: Write) -> None:
        self._parts, self._call, self._write = parts, call, write
        self._writing = asyncio.Lock()  # grpc takes one message at a time
        self._room = asyncio.Semaphore(parts.config.max_stream_items_in_flight)
        self._share = parts.stream_admission.share()
        self._ids: set[int] = set()
        self._n_items = 0
        self._carried: State | None = None
        self._stalled = False

    async def run(self, requests: AsyncIterator[embed_pb2.EmbedStreamRequest]) -> None:
        """Serves the stream until the caller has sent everything and got everything.

        Raises:
            RefusalError: what ends the stream as a whole.
            CallerGoneError: if there is nobody to send results to.
        """
        start = await self._read_start(requests)
        wanted = parse_options(start.options, self._parts.model)
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._read_items(requests, start, wanted, tasks)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _read_start(self, requests: AsyncIterator[embed_pb2.EmbedStreamRequest]) -> embed_pb2.StreamStart:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "start":
            raise RefusalError(Reason.STREAM_ORDER, "the first message must hold `start`")
        check_model(first.start.model, first.start.expected_model_version, self._parts.model)
        return first.start

    async def _read_items(
        self,
        requests: AsyncIterator[embed_pb2.EmbedStreamRequest],
        start: embed_pb2.StreamStart,
        wanted: Wanted,
        tasks: asyncio.TaskGroup,
    ) -> None:
        await self._room.acquire()
        async for request in requests:
            if request.WhichOneof("message") != "item":
                raise RefusalError(Reason.STREAM_ORDER, "every message after the first must hold `item`")
            self._register(request.item.id)
            if start.carry_state:
                await self._answer_carrying(request.item, start.return_state_every, wanted)
            else:
                await self._begin_answer(request.item, wanted, tasks)
            # Only with room for another item is another one read: that is the stream's flow control
            await self._room.acquire()

    def _register(self, item_id: int) -> None:
        if item_id in self._ids:
            raise RefusalError(Reason.ID_IN_USE, f"id {item_id}: its last result has not been sent")
        self._ids.add(item_id)
        self._n_items += 1

    # ---- independent items ----

    async def _begin_answer(self, item: embed_pb2.StreamItem, wanted: Wanted, tasks: asyncio.TaskGroup) -> None:
        try:
            sentence, cost = await self._admit(item, wanted)
        except RefusalError as error:
            await self._fail(item.id, error)
            self._room.release()
            return
        task = tasks.create_task(self._answer(item.id, sentence, wanted))
        # Not in a `finally` of the task: one that is cancelled before its first step never gets there
        task.add_done_callback(lambda _: self._make_room(cost))

    def _make_room(self, cost: Cost) -> None:
        self._share.release(cost)
        self._room.release()

    async def _answer(self, item_id: int, sentence: PreparedSentence, wanted: Wanted) -> None:
        try:
            job = Job(sentence, wanted, sentence.state, sentence.return_state, self._call)
            await self._write_rows(item_id, sentence, await self._parts.inference.submit(job), wanted)
        except RefusalError as error:
            await self._fail(item_id, error)

    # ---- items that go on from one another ----

    async def _answer_carrying(self, item: embed_pb2.StreamItem, return_state_every: int, wanted: Wanted) -> None:
        if return_state_every and self._n_items % return_state_every == 0:
            item.sentence.return_state = True
        try:
            sentence, cost = await self._admit(item, wanted)
            try:
                outcome = await self._compute_carrying(sentence, wanted)
                await self._write_rows(item.id, sentence, outcome, wanted)
            finally:
                self._share.release(cost)
        except RefusalError as error:
            await self._fail(item.id, error)
        self._room.release()

    async def _compute_carrying(self, sentence: PreparedSentence, wanted: Wanted) -> Outcome:
        before = self._carried if sentence.state is None else sentence.state
        outcome = await self._parts.inference.submit(Job(sentence, wanted, before, want_state=True, call=self._call))
        self._carried = outcome.state
        return outcome

    # ---- both ----

    async def _admit(self, item: embed_pb2.StreamItem, wanted: Wanted) -> tuple[PreparedSentence, Cost]:
        parts = self._parts
        sentence = await parts.conversions.item(
            item.ByteSize(),
            lambda: prepare_sentence(item.sentence, wanted, parts.model, parts.sentence_limits),
        )
        cost = Cost(len(sentence.tokens), sentence.answer_bytes(wanted, parts.model))
        # The caller's own limit first: whoever waits for it holds no room that others could use
        caller = current_call().caller
        await parts.caller_limits.acquire(caller, cost.tokens)
        try:
            await self._share.acquire(cost)
        except BaseException:
            parts.caller_limits.correct(caller, -cost.tokens)  # what isn't admitted costs nothing
            raise
        return sentence, cost

    async def _write_rows(self, item_id: int, sentence: PreparedSentence, outcome: Outcome, wanted: Wanted) -> None:
        model = self._parts.model
        current_call().computed(len(sentence.tokens), outcome.queue_s, outcome.inference_s)
        for rows in responses.stream_rows(sentence, outcome, wanted, model):
            usage = responses.usage([(sentence, outcome)], model) if rows.last else None
            if rows.last:
                self._ids.remove(item_id)  # before it is sent: the caller may use it again as soon as this arrives
            await self._send(embed_pb2.EmbedStreamResponse(id=item_id, rows=rows, usage=usage))

    async def _fail(self, item_id: int, error: RefusalError) -> None:
        """Answers an item with an error, unless the error isn't the item's: then the whole stream had better move."""
        if error.code is Code.UNAVAILABLE:
            raise error
        current_call().sentence_failed()
        self._ids.remove(item_id)
        await self._send(embed_pb2.EmbedStreamResponse(id=item_id, error=status_of(error)))

    async def _send(self, message: embed_pb2.EmbedStreamResponse) -> None:
        async with self._writing:
            if self._stalled:  # grpc has still the message that nobody reads, and takes no other one
                raise _stalled()
            try:
                async with asyncio.timeout(self._parts.config.stream_stall_s):
                    await self._write(message)
            except grpc.aio.InternalError as error:  # that's how grpc tells before it cancels the handler
                raise CallerGoneError from error
            except TimeoutError:
                self._stalled = True
                raise _stalled() from None


def _stalled() -> RefusalError:
    return RefusalError(Reason.STREAM_STALLED, "the results were not read in time")
