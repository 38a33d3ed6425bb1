"""Log lines to a file descriptor, by its own thread.

A full disk, a reader that has gone or one that is stuck costs lines, which are counted, but neither time nor the
service.
"""

import logging
import math
import os
import select
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import accumulate

_MAX_QUEUED_BYTES = 4 * 2**20
_UNFORMATTED_BYTES = 1024
"""What a line counts that isn't formatted yet; an access line has 300, and its names are bounded."""
_FLUSH_TIMEOUT_S = 2.0
_GATHER_S = 0.02
"""Time between two writes of lines that aren't urgent: a busy server wakes the thread 50 times a second, not once a
line."""


class LineWriter:
    """Writes lines to a file descriptor, in its own thread; what it can't hold or write is lost and counted."""

    def __init__(
        self,
        descriptor: int | None,
        lost_line: Callable[[int], str],
        *,
        write: Callable[[int, memoryview], int] = os.write,
        gather_s: float = _GATHER_S,
    ) -> None:
        """Keep the file; call `start` to start the thread.

        Args:
            descriptor: of the file; None: everything is lost.
            lost_line: returns the line that reports how many were lost, once lines can be written again.
            write: writes to a descriptor; returns how many bytes it took.
            gather_s: time from one write until a line that isn't urgent is written, so that others are written with
                it; after a longer pause it is written at once.
        """
        self._write, self._gather_s = write, gather_s
        self._descriptor, self._lost_line = descriptor, lost_line
        lock = threading.Lock()
        self._wake, self._written = threading.Condition(lock), threading.Condition(lock)
        self._urgent = False
        self._lines: deque[bytes | Callable[[], str]] = deque()
        self._queued_bytes = 0  # those being written included
        self._dropped = self._reported = 0
        self._closing = False
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    @property
    def dropped(self) -> int:
        """Lines lost so far."""
        return self._dropped

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def write(self, line: str | Callable[[], str]) -> None:
        """Queue a line, which is written at once, or what returns one, which the thread calls: that isn't urgent.

        Never waits for the file.
        """
        urgent = isinstance(line, str)
        queued = _encoded(line) if isinstance(line, str) else line
        with self._wake:
            if self._closing or self._queued_bytes + _n_bytes(queued) > _MAX_QUEUED_BYTES:
                self._dropped += 1
                return
            self._lines.append(queued)
            self._queued_bytes += _n_bytes(queued)
            self._urgent |= urgent
            if urgent or len(self._lines) == 1:  # with more, the thread is awake
                self._wake.notify()

    def count_lost(self) -> None:
        """Count a record that could not be formatted."""
        with self._wake:
            self._dropped += 1

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything is written or lost; return whether it is."""
        with self._wake:
            self._urgent = True
            self._wake.notify()
            return self._written.wait_for(lambda: not self._queued_bytes or not self._thread.is_alive(), timeout_s)

    def close(self) -> None:
        """Write what is queued, if that doesn't take long, and end the thread; idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(_FLUSH_TIMEOUT_S)

    # ---- in the thread ----

    def _run(self) -> None:
        written_s = -math.inf
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._lines or self._closing)
                left_s = self._gather_s - (time.monotonic() - written_s)
                if left_s > 0:
                    self._wake.wait_for(lambda: self._urgent or self._closing, left_s)
                queued, self._urgent = list(self._lines), False
                self._lines.clear()
                lost = self._dropped - self._reported
            if not queued:
                return
            notice = [_encoded(self._lost_line(lost))] if lost else []
            lines = [line for each in queued if (line := _formatted(each))]
            n_written = self._write_all([*notice, *lines]) - len(notice)
            written_s = time.monotonic()
            with self._wake:
                if n_written >= 0:
                    self._reported += lost
                self._dropped += len(queued) - max(0, n_written)
                self._queued_bytes -= sum(map(_n_bytes, queued))
                self._written.notify_all()

    def _write_all(self, lines: list[bytes]) -> int:
        """Return how many lines were written whole."""
        prefix = b"\n" if self._torn else b""
        n_written = self._write_bytes(prefix + b"".join(lines)) - len(prefix)
        ends = [0, *accumulate(map(len, lines))]
        n_whole = bisect_right(ends, max(0, n_written)) - 1
        self._torn = n_written < 0 or n_written > ends[n_whole]
        return n_whole

    def _write_bytes(self, data: bytes) -> int:
        """Return how many bytes were written before an error."""
        n_written = 0
        try:
            while n_written < len(data) and self._descriptor is not None:
                try:
                    n_written += self._write(self._descriptor, memoryview(data)[n_written:])
                except BlockingIOError:  # another process that shares the descriptor made it so
                    select.select([], [self._descriptor], [])
        except OSError:
            pass  # the caller counts what is missing
        return n_written


def _encoded(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace") + b"\n"


def _n_bytes(queued: bytes | Callable[[], str]) -> int:
    return len(queued) if isinstance(queued, bytes) else _UNFORMATTED_BYTES


def _formatted(queued: bytes | Callable[[], str]) -> bytes:
    """Return a line; b"" if it can't be formatted."""
    if isinstance(queued, bytes):
        return queued
    try:
        return _encoded(queued())
    except Exception:  # as in `LineHandler.emit`; the caller counts what is missing
        return b""


class LineHandler(logging.Handler):
    """Hands lines to a `LineWriter`, formatted, save those of records with fields, whose values don't change."""

    def __init__(self, descriptor: int | None, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.writer = LineWriter(descriptor, lambda lost: formatter.format(_lost_record(lost)))

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line; part of logging's interface."""
        if hasattr(record, "fields"):
            self.writer.write(partial(self.format, record))
            return
        try:
            line = self.format(record)
        except Exception:  # arguments that don't fit the message: no reason to fail the code that logs it
            self.writer.count_lost()
            return
        self.writer.write(line)

    def flush(self) -> None:
        """Wait a little until everything is written; part of logging's interface."""
        self.writer.flush()

    def close(self) -> None:
        """End the thread; part of logging's interface."""
        self.writer.close()
        super().close()


def _lost_record(lost: int) -> logging.LogRecord:
    found = logging.LogRecord(__name__, logging.WARNING, __file__, 0, "%d log lines were lost", (lost,), None)
    found.lineno = _lost_record.__code__.co_firstlineno
    return found
