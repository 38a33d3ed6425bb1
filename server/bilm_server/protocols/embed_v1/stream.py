"""One EmbedStream: reads items while there is room, answers each as soon as it is ready."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2

from bilm_server.embedding.admission import Reservation
from bilm_server.embedding.embedder import SentenceStream
from bilm_server.embedding.registry import Registry
from bilm_server.errors import CallerGoneError, Code, RefusalError
from bilm_server.inference.types import Call, Result, Sentence
from bilm_server.protocols.embed_v1.requests import new_sentence, parse_options, parse_priority
from bilm_server.protocols.embed_v1.responses import WireFormat
from bilm_server.protocols.grpc.status import status_of

Write = Callable[[embed_pb2.EmbedStreamResponse], Awaitable[None]]


class StreamHandler:
    """The state of one stream."""

    def __init__(self, models: Registry, call: Call, write: Write, stall_s: float) -> None:
        """Set the parts.

        Args:
            models: what embeds.
            call: the sentences'.
            write: sends a message.
            stall_s: seconds that it may take.
        """
        self._models, self._call, self._write, self._stall_s = models, call, write, stall_s
        self._writing = asyncio.Lock()  # grpc takes one message at a time
        self._ids: set[int] = set()
        self._n_items = 0
        self._stalled = False

    async def run(self, requests: AsyncIterator[embed_pb2.EmbedStreamRequest]) -> None:
        """Serve the stream until the client has sent everything and got everything.

        Raises:
            RefusalError: what ends the stream as a whole.
            CallerGoneError: if there is nobody to send results to.
        """
        start = await self._read_start(requests)
        embedder = self._models.find(start.model, start.expected_model_version)
        output = parse_options(start.options, embedder.model)
        embedder.prioritise(self._call, parse_priority(start.priority))
        self._stream: SentenceStream = embedder.stream()
        wire = WireFormat(embedder.model, start.options.omit_tokens)
        try:
            async with asyncio.TaskGroup() as tasks:
                place = await self._stream.place()
                async for request in requests:
                    item = self._register(request)
                    sentence = new_sentence(item.sentence, output, self._call)
                    if start.carry_state:
                        with place:
                            await self._answer_next(item, sentence, wire, start.return_state_every)
                    else:
                        await self._begin_answer(item, sentence, wire, place, tasks)
                    # Only with a place for another item is another one read: that is the stream's flow control
                    place = await self._stream.place()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _read_start(self, requests: AsyncIterator[embed_pb2.EmbedStreamRequest]) -> embed_pb2.StreamStart:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "start":
            raise RefusalError(Reason.STREAM_ORDER, "the first message must hold `start`")
        return first.start

    def _register(self, request: embed_pb2.EmbedStreamRequest) -> embed_pb2.StreamItem:
        if request.WhichOneof("message") != "item":
            raise RefusalError(Reason.STREAM_ORDER, "every message after the first must hold `item`")
        if request.item.id in self._ids:
            raise RefusalError(Reason.ID_IN_USE, f"id {request.item.id}: its last result has not been sent")
        self._ids.add(request.item.id)
        self._n_items += 1
        return request.item

    # ---- independent items ----

    async def _begin_answer(
        self,
        item: embed_pb2.StreamItem,
        sentence: Sentence,
        wire: WireFormat,
        place: Reservation,
        tasks: asyncio.TaskGroup,
    ) -> None:
        try:
            room = await self._admit(item, sentence, wire)
        except RefusalError as error:
            await self._fail(item.id, error)
            place.release()
            return
        task = tasks.create_task(self._answer(item.id, sentence, wire))

        def release(_: object) -> None:
            room.release()
            place.release()

        # Not in a `with` in the task: one that is cancelled before its first step never gets there
        task.add_done_callback(release)

    async def _answer(self, item_id: int, sentence: Sentence, wire: WireFormat) -> None:
        try:
            result = await self._stream.embed(sentence)
            await self._write_rows(item_id, sentence, result, wire, with_state=sentence.return_state)
        except RefusalError as error:
            await self._fail(item_id, error)

    # ---- items that continue from one another ----

    async def _answer_next(
        self, item: embed_pb2.StreamItem, sentence: Sentence, wire: WireFormat, return_state_every: int
    ) -> None:
        if return_state_every and self._n_items % return_state_every == 0:
            sentence.return_state = True
        with_state = sentence.return_state
        try:
            with await self._admit(item, sentence, wire):
                result = await self._stream.embed_next(sentence)
                await self._write_rows(item.id, sentence, result, wire, with_state=with_state)
        except RefusalError as error:
            await self._fail(item.id, error)

    # ---- both ----

    async def _admit(self, item: embed_pb2.StreamItem, sentence: Sentence, wire: WireFormat) -> Reservation:
        return await self._stream.admit(sentence, item.ByteSize(), wire.overhead_bytes)

    async def _write_rows(
        self, item_id: int, sentence: Sentence, result: Result, wire: WireFormat, *, with_state: bool
    ) -> None:
        for message in wire.rows(item_id, sentence, result, with_state=with_state):
            if message.rows.last:
                self._ids.remove(item_id)  # before it is sent: the client may use it again as soon as this arrives
            await self._send(message)

    async def _fail(self, item_id: int, error: RefusalError) -> None:
        """Answer an item with an error, unless it isn't the item's own: then raise it, which ends the stream."""
        if error.code is Code.UNAVAILABLE:
            raise error
        self._ids.remove(item_id)
        await self._send(embed_pb2.EmbedStreamResponse(id=item_id, error=status_of(error)))

    async def _send(self, message: embed_pb2.EmbedStreamResponse) -> None:
        async with self._writing:
            if self._stalled:  # grpc has still the message that nobody reads, and takes no other one
                raise _stalled()
            try:
                async with asyncio.timeout(self._stall_s):
                    await self._write(message)
            except grpc.aio.InternalError as error:  # that's how grpc reports it before it cancels the handler
                raise CallerGoneError from error
            except TimeoutError:
                self._stalled = True
                raise _stalled() from None


def _stalled() -> RefusalError:
    return RefusalError(Reason.STREAM_STALLED, "the results were not read in time")
