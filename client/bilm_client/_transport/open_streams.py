"""The streams of this process that have not ended, closed before the interpreter is torn down.

At the end of a process Python freezes daemon threads wherever they are, gRPC's and the readers of streams among them. A
lock that one of them holds is never released, so whatever takes it afterwards (a generator's `finally`, a finaliser of
gRPC's) hangs. Functions registered with `atexit` run before that, while all threads still do.
"""

import atexit
import os
import threading
import time
from typing import Protocol

from bilm_client.errors import ClientClosedError, ForkedError

_EXIT_TIMEOUT_S = 2.0


class EndableStream(Protocol):
    """A call with its threads."""

    def close(self) -> None:
        """Cancel the call, without waiting."""

    def interrupt(self) -> None:
        """End the call, without waiting, so that its reader continues with another one."""

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the call and of its threads."""


class OpenStreams:
    """The streams that have not ended; without a lock, since finalisers come here, too."""

    def __init__(self) -> None:
        self._streams: dict[int, EndableStream] = {}  # by id: each operation on a dict is atomic
        self._ended = False
        self._forked = threading.Event()  # unset while the process is being forked
        self._forked.set()

    def add(self, stream: EndableStream) -> None:
        """Remember a stream until it is discarded."""
        self._streams[id(stream)] = stream

    def discard(self, stream: EndableStream) -> None:
        """Forget a stream whose call and threads have ended."""
        self._streams.pop(id(stream), None)

    def wait_for_fork(self) -> None:
        """Wait, before a stream is opened, until no fork is under way; not for ever, as one may fail."""
        self._forked.wait(_EXIT_TIMEOUT_S)

    def check(self) -> None:
        """Let no stream be opened or read once the interpreter is shutting down.

        A daemon thread waits here until it is frozen: an error would only put a traceback on standard error.

        Raises:
            ClientClosedError: The interpreter is shutting down.
        """
        if not self._ended:
            return
        if threading.current_thread().daemon:
            threading.Event().wait()
        raise ClientClosedError("the interpreter is shutting down")

    def close(self, timeout_s: float = _EXIT_TIMEOUT_S) -> None:
        """Close all streams and wait for their ends, in `timeout_s` seconds together."""
        self._ended = True
        streams = list(self._streams.values())
        for stream in streams:
            stream.close()
        _join(streams, timeout_s)

    def interrupt(self, timeout_s: float = _EXIT_TIMEOUT_S) -> None:
        """End the calls of all streams for now, and wait for it, in `timeout_s` seconds together.

        Before a fork: what gRPC's core does in another thread at that moment, it never ends in the child, which then
        hangs or aborts with its first call. The streams continue in this process with calls of their own.
        """
        self._forked = threading.Event()
        streams = list(self._streams.values())
        for stream in streams:
            stream.interrupt()
        _join(streams, timeout_s)

    def resume(self) -> None:
        """Let streams be opened again, in the parent."""
        self._forked.set()

    def forget(self) -> None:
        """Forget all streams, in the child: the parent's are not this process's to close."""
        self._streams = {}
        self._forked = threading.Event()
        self._forked.set()


def _join(streams: list[EndableStream], timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    for stream in streams:
        stream.join(max(0.0, until_s - time.monotonic()))


class StreamOwner:
    """The process that reads a stream, which it is made by."""

    def __init__(self) -> None:
        self._process_id = os.getpid()

    def check(self) -> None:
        """Let the stream be read by this process only, and not after the end of its call at exit.

        Raises:
            ForkedError: The process is another one.
            ClientClosedError: The interpreter is shutting down.
        """
        if os.getpid() != self._process_id:
            raise ForkedError(
                f"this stream was opened by process {self._process_id}, of which this one is a fork: open another one"
            )
        OPEN_STREAMS.check()


OPEN_STREAMS = OpenStreams()
atexit.register(OPEN_STREAMS.close)
os.register_at_fork(
    before=OPEN_STREAMS.interrupt, after_in_parent=OPEN_STREAMS.resume, after_in_child=OPEN_STREAMS.forget
)
