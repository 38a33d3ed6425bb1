"""One stream of EmbedStream over a synchronous channel, for both clients.

gRPC writes from its own thread, and a reader thread delivers what comes; both end with the connection. The
asynchronous client goes this way too: where a write meets the end of a call, grpc.aio (1.85.1) reports the write's
failure as the call's status, INTERNAL, and the server's own status is lost; measured for one refused stream in five.

The reader never waits for the caller. A server holds a result until it is read, and what it holds is missing for other
streams: a caller that reads two streams in turns would wait for the second one while the first one, unread, holds what
the second one needs. So memory is bounded by what is asked for (`window` and `window_tokens`), not by reading late.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2 as pb

from bilm_client._transport.base import Deliver, Delivery, Interruption
from bilm_client._transport.open_streams import OPEN_STREAMS
from bilm_client.errors import BilmError, ended_early

_END_TIMEOUT_S = 5.0
_SPINNER_TIMEOUT_S = 0.2  # it lives on where other calls of its channel do


Call = Any  # a grpc.Call that is also an iterator of responses: gRPC's types have no one name for it
Connect = Callable[[Iterator[pb.EmbedStreamRequest]], Call]
Translate = Callable[[grpc.RpcError], BilmError]


class GrpcConnection:
    """One stream; a `StreamConnection`.

    Finalisers close connections too, in any thread and at any moment: `close` waits for nothing.

    Args:
        connect: Starts the call, given its requests.
        translate: Makes the package's exception from gRPC's.
        opening: The first messages.
        deliver: Takes each response and, last, the error that ended the stream (its proper end is one too); called in
            the reader thread, and not after `close`.
    """

    def __init__(
        self,
        connect: Connect,
        translate: Translate,
        opening: list[pb.EmbedStreamRequest],
        deliver: Deliver,
    ) -> None:
        OPEN_STREAMS.check()
        OPEN_STREAMS.wait_for_fork()
        self._process_id = os.getpid()
        self._translate = translate
        self._deliver = deliver
        self._closed = False
        self._requests = _Requests(opening)
        self._call_ended = threading.Event()
        self._call = connect(self._requests)
        self._spinner: threading.Thread | None = None  # gRPC's, for the calls of one channel
        if not self._call.add_callback(self._end_call):
            self._call_ended.set()
        self._reader = threading.Thread(target=self._read, name="bilm-stream-reader", daemon=True)
        try:
            self._reader.start()
        except BaseException:
            self._call.cancel()
            raise
        OPEN_STREAMS.add(self)

    def send(self, request: pb.EmbedStreamRequest) -> None:
        """Hand a message to gRPC's writer."""
        self._requests.put(request)

    def half_close(self) -> None:
        """Say that no more messages come."""
        self._requests.end()

    def close(self) -> None:
        """Cancel the call, if it is still under way; its threads end soon.

        Does nothing in a child process, whose call it isn't, nor while the interpreter is torn down: locks of threads
        that exist no more, or are frozen, may never be released.
        """
        if self._closed or os.getpid() != self._process_id or sys.is_finalizing():
            return
        self._closed = True
        self._requests.end()
        self._call.cancel()

    def interrupt(self) -> None:
        """End the call for now, as before a fork; its driver continues with another one."""
        if not self._closed:
            self._deliver(Interruption())
            self.close()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of a closed connection's threads and of gRPC's work for its call."""
        self._reader.join(timeout_s)
        if self._spinner is not None:
            self._spinner.join(min(timeout_s, _SPINNER_TIMEOUT_S))

    def _end_call(self) -> None:
        self._spinner = threading.current_thread()
        self._call_ended.set()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._pass_on(response)
            self._pass_on(ended_early())
        except grpc.RpcError as error:
            failure = self._translate(error)
            failure.__cause__ = error
            self._pass_on(failure)
        finally:
            self._requests.end()
            self._call_ended.wait(_END_TIMEOUT_S)
            self._requests.join_writer(_END_TIMEOUT_S)
            OPEN_STREAMS.discard(self)

    def _pass_on(self, delivery: Delivery) -> None:
        if not self._closed:
            self._deliver(delivery)


class _Requests:
    """The messages of a stream, an iterator for gRPC's writer thread."""

    def __init__(self, opening: list[pb.EmbedStreamRequest]) -> None:
        self._messages: SimpleQueue[pb.EmbedStreamRequest | None] = SimpleQueue()
        self._writer: threading.Thread | None = None
        for request in opening:
            self.put(request)

    def put(self, request: pb.EmbedStreamRequest) -> None:
        self._messages.put(request)

    def end(self) -> None:
        self._messages.put(None)

    def join_writer(self, timeout_s: float) -> None:
        """Wait for the end of the thread that takes the messages."""
        if self._writer is not None:
            self._writer.join(timeout_s)

    def __iter__(self) -> "_Requests":
        return self

    def __next__(self) -> pb.EmbedStreamRequest:
        self._writer = threading.current_thread()
        message = self._messages.get()
        if message is None:
            raise StopIteration
        return message
