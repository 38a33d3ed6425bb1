"""An EmbedStream without a network."""

import threading
from collections import deque
from dataclasses import dataclass

from bilm_api.v1 import embed_pb2 as pb
from bilm_client._transport.base import Deliver, Delivery
from bilm_client.errors import ClientClosedError, ended_early
from bilm_model.engine.types import State

from bilm_local.computing import ComputingThread, LocalCall, LocalResult
from bilm_local.loading import LocalModel
from bilm_local.messages import stream_response
from bilm_local.sentences import LocalSentence, RefusedSentenceError, output_of, prepare


@dataclass(frozen=True, slots=True)
class LocalItem:
    """A sentence of a stream.

    Attributes:
        id: Its number.
        prepared: The sentence, or what is wrong with it.
        with_state: Whether its state is returned.
    """

    id: int
    prepared: LocalSentence | RefusedSentenceError
    with_state: bool


class LocalStream:
    """A `StreamConnection`. Where sentences continue from one another, one is computed at a time.

    Args:
        thread: Computes.
        model: That it computes with.
        start: The options.
        deliver: Takes each response and, last, the end.
    """

    def __init__(self, thread: ComputingThread, model: LocalModel, start: pb.StreamStart, deliver: Deliver) -> None:
        self._thread, self._model, self._start, self._deliver = thread, model, start, deliver
        self._output = output_of(start.options)
        self._lock = threading.RLock()  # finalisers close streams wherever they run
        self._waiting: deque[LocalItem] = deque()
        self._under_way: dict[int, LocalCall] = {}
        self._carried: State | None = None
        self._half_closed = self._closed = False

    def send(self, request: pb.EmbedStreamRequest) -> None:
        """Tokenise a sentence here, and leave the rest to the thread."""
        message = request.item.sentence
        prepared: LocalSentence | RefusedSentenceError
        try:
            prepared = prepare(message, self._output, self._model)
        except RefusedSentenceError as error:
            prepared = error
        with self._lock:
            self._waiting.append(LocalItem(request.item.id, prepared, message.return_state))
        self._begin()

    def half_close(self) -> None:
        """Deliver the end behind the last result."""
        with self._lock:
            self._half_closed = True
        self._begin()

    def close(self) -> None:
        """Cancel what is under way, without waiting."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            calls = list(self._under_way.values())
        for call in calls:
            self._thread.cancel(call)

    def _begin(self) -> None:
        """Submit what may be computed; deliver what is refused, in its turn, and the end."""
        while (item := self._next()) is not None:
            if isinstance(item.prepared, RefusedSentenceError):
                self._end(item, item.prepared)
            else:
                self._submit(item, item.prepared)

    def _next(self) -> LocalItem | None:
        with self._lock:
            if self._closed or (self._start.carry_state and self._under_way):
                return None
            if not self._waiting:
                self._deliver_end()
                return None
            item = self._waiting.popleft()
            call = LocalCall(
                [] if isinstance(item.prepared, RefusedSentenceError) else [item.prepared],
                batch=self._start.priority == pb.PRIORITY_BATCH,
            )
            self._under_way[item.id] = call
            return item

    def _submit(self, item: LocalItem, sentence: LocalSentence) -> None:
        call = self._under_way[item.id]
        if self._start.carry_state:
            sentence.return_state = True
            sentence.state = self._carried if sentence.state is None else sentence.state
        call.done.add_done_callback(lambda _: self._on_done(item, call))
        try:
            self._thread.submit(call)
        except ClientClosedError as error:
            self._put(error)

    def _on_done(self, item: LocalItem, call: LocalCall) -> None:
        if call.done.cancelled():
            return
        error = call.done.exception()
        if error is not None:
            self._put(error)  # type: ignore[arg-type] # a call fails by errors of the client's
            return
        (result,) = call.done.result()
        if self._start.carry_state and not isinstance(result, RefusedSentenceError):
            self._carried = result.state
        self._end(item, result)
        self._begin()

    def _end(self, item: LocalItem, result: LocalResult) -> None:
        omit_tokens = self._start.options.omit_tokens
        response = stream_response(self._model, item.id, result, omit_tokens=omit_tokens, with_state=item.with_state)
        self._put(response)
        with self._lock:
            del self._under_way[item.id]

    def _put(self, delivery: Delivery) -> None:
        if not self._closed:
            self._deliver(delivery)

    def _deliver_end(self) -> None:
        if self._half_closed and not self._under_way:
            self._closed = True
            self._deliver(ended_early())
