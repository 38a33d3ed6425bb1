"""Drives a stream session in the caller's thread, in which alone the caller's iterable is read."""

from collections.abc import Callable, Generator, Iterator
from queue import Empty, SimpleQueue

from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.inputs import Input
from bilm_client._core.job import Outcome
from bilm_client._core.session import ResumableSession
from bilm_client._core.settings import ResultTimeout
from bilm_client._transport.base import Delivery, Interruption, StreamConnection, StreamOpener
from bilm_client._transport.open_streams import StreamOwner
from bilm_client.errors import BilmError, ServiceError


class SyncStream:
    """A session, its input and its present connection.

    Args:
        session: Says what to send, and what the messages that come mean.
        inputs: The sentences.
        open_stream: Opens a connection.
        wait: Waits for so many seconds before another attempt.
        timeout: The longest wait for a result.
        learn: Asks the server for its model, for a session that must know of it.
        failed: Takes each error that ended a connection before all that was due had come.
    """

    def __init__(
        self,
        session: ResumableSession,
        inputs: Iterator[Input],
        *,
        open_stream: StreamOpener,
        wait: Callable[[float], object],
        timeout: ResultTimeout,
        learn: Callable[[], object],
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
        self._deliveries: SimpleQueue[Delivery] = SimpleQueue()

    def run(self) -> Generator[Outcome, None, None]:
        """Yield the results in input order; closing the generator cancels the call."""
        owner = StreamOwner()
        try:
            while not self._session.finished:
                owner.check()
                self._feed()
                while not self._session.ready and self._session.awaiting:
                    self._receive(wait=True)
                outcome = self._session.take()
                if outcome is not None:
                    self._timeout.reset()
                    yield outcome
            self._finish()
        finally:
            self._disconnect()

    def _feed(self) -> None:
        # At least one sentence is read for each result that leaves, else the server would run dry while ready
        # results are handed out.
        while self._session.accepts_input:
            try:
                source = next(self._inputs)
            except StopIteration:
                self._end_input()
                return
            if self._session.must_learn(source):
                self._learn()
            message = self._session.add(source)
            if self._connection is None:
                self._open()
            else:
                self._connection.send(message)
            self._receive(wait=False)
            if self._session.ready:
                return

    def _end_input(self) -> None:
        self._session.ended = True
        if self._connection is not None:
            self._connection.half_close()

    def _open(self) -> None:
        self._deliveries = SimpleQueue()  # what an earlier connection still delivers must not be taken for this one's
        opening = self._session.opening()
        self._connection = self._open_stream(opening, self._deliveries.put, self._timeout.deadline)
        if self._session.ended:
            self._connection.half_close()

    def _receive(self, *, wait: bool) -> None:
        """Take what has come, and before that, if asked to, wait for a message or a break."""
        if self._connection is None:
            self._open()
        timeout_s = self._timeout.remaining_s() if wait else 0.0
        try:
            while (response := self._poll(timeout_s)) is not None:
                self._session.receive(response)
                self._timeout.reset()
                timeout_s = 0.0
        except ServiceError as error:
            self._disconnect()
            if self._session.awaiting:  # else all that was due is here, and the stream's end may have come right behind
                self._failed(error)
                self._wait(self._timeout.pause_s(self._session.broken(error), error))

    def _poll(self, timeout_s: float | None) -> pb.EmbedStreamResponse | None:
        """Return the next message; None if none comes in `timeout_s` seconds (0: don't wait; None: no limit)."""
        try:
            delivery = self._deliveries.get(block=timeout_s != 0, timeout=timeout_s or None)
        except Empty:
            return None
        if isinstance(delivery, BilmError):
            raise delivery
        if isinstance(delivery, Interruption):
            self._disconnect()
            return None
        return delivery

    def _finish(self) -> None:
        # The last result is here; let the server end the call in good order rather than see it cancelled.
        if self._connection is not None:
            try:
                self._poll(1.0)
            except BilmError:
                return

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
