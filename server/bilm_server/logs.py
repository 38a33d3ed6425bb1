"""Log lines: text for people, or JSON, one object a line. Never the text of a request.

Lines are written by a thread of its own: a full disk, a reader that has gone or one that is stuck costs lines, which
are counted, but neither time nor the service.
"""

import json
import logging
import os
import re
import select
import sys
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from bilm_server.calls import CallRecord
from bilm_server.errors import Code
from bilm_server.log_levels import PARTS

_access_log = logging.getLogger("bilm_server.access")
_test_log = logging.getLogger("bilm_server.test")
_test_log.propagate = False  # without a file of their own, lines of test calls go nowhere

_TEXT = "%(asctime)s %(levelname)s %(name)s %(filename)s:%(lineno)d %(message)s"
_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_PLAIN_VALUE = re.compile(r"[\w.:/@%\[\]-]+")

_MAX_QUEUED_BYTES = 4 * 2**20
_FLUSH_TIMEOUT_S = 2.0


class LineWriter:
    """Writes lines to a file descriptor, in a thread of its own; what it can't hold or write is lost and counted."""

    def __init__(self, descriptor: int | None, lost_line: Callable[[int], str]) -> None:
        """Prepares; `start` starts.

        Args:
            descriptor: where to; None: nowhere, everything is lost.
            lost_line: says how many were lost, for the log, once there is room for lines again.
        """
        self._descriptor, self._lost_line = descriptor, lost_line
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._queued_bytes = 0  # those being written included
        self._dropped = self._told = 0
        self._closing = False
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    @property
    def dropped(self) -> int:
        """Lines lost so far."""
        return self._dropped

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def write(self, line: str) -> None:
        """Takes a line; never waits for the file."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if self._closing or self._queued_bytes + len(data) > _MAX_QUEUED_BYTES:
                self._dropped += 1
                return
            self._lines.append(data)
            self._queued_bytes += len(data)
            self._changed.notify_all()

    def count_lost(self) -> None:
        """Counts a line that didn't become one."""
        with self._changed:
            self._dropped += 1

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Waits until everything is written or lost; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queued_bytes or not self._thread.is_alive(), timeout_s)

    def close(self) -> None:
        """Writes what there is, if that doesn't take long, and ends the thread; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(_FLUSH_TIMEOUT_S)

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing)
                lines = list(self._lines)
                self._lines.clear()
                lost = self._dropped - self._told
            if not lines:
                return
            notice = [self._lost_line(lost).encode() + b"\n"] if lost else []
            n_written = self._write_all([*notice, *lines]) - len(notice)
            with self._changed:
                if n_written >= 0:
                    self._told += lost
                self._dropped += len(lines) - max(0, n_written)
                self._queued_bytes -= sum(map(len, lines))
                self._changed.notify_all()

    def _write_all(self, lines: list[bytes]) -> int:
        """Returns how many lines were written whole."""
        prefix = b"\n" if self._torn else b""
        n_written = self._write_bytes(prefix + b"".join(lines)) - len(prefix)
        ends = [0, *accumulate(map(len, lines))]
        n_whole = bisect_right(ends, max(0, n_written)) - 1
        self._torn = n_written < 0 or n_written > ends[n_whole]
        return n_whole

    def _write_bytes(self, data: bytes) -> int:
        """Returns how many were written before an error."""
        n_written = 0
        try:
            while n_written < len(data) and self._descriptor is not None:
                try:
                    n_written += os.write(self._descriptor, memoryview(data)[n_written:])
                except BlockingIOError:  # somebody who shares the descriptor made it so
                    select.select([], [self._descriptor], [])
        except OSError:
            pass  # the caller counts what is missing
        return n_written


class _LineHandler(logging.Handler):
    """Hands formatted lines to a `LineWriter`."""

    def __init__(self, descriptor: int | None, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.writer = LineWriter(descriptor, lambda lost: formatter.format(_lost_record(lost)))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # arguments that don't fit the message: no reason to fail whoever logs it
            self.writer.count_lost()
            return
        self.writer.write(line)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
        super().close()


def _lost_record(lost: int) -> logging.LogRecord:
    found = logging.LogRecord("bilm_server.logs", logging.WARNING, __file__, 0, "%d log lines were lost", (lost,), None)
    found.lineno = _lost_record.__code__.co_firstlineno
    return found


class Logs:
    """The configured log."""

    def __init__(self, handler: _LineHandler, test_handler: _LineHandler | None, test_descriptor: int | None) -> None:
        self._handlers = (handler,) if test_handler is None else (handler, test_handler)
        self._test_handler, self._test_descriptor = test_handler, test_descriptor

    @property
    def dropped(self) -> int:
        """Lines lost so far; for the metrics."""
        return sum(handler.writer.dropped for handler in self._handlers)

    def flush(self) -> None:
        """Waits a little until everything is written."""
        for handler in self._handlers:
            handler.flush()

    def close(self) -> None:
        """Ends logging; idempotent."""
        logging.getLogger().removeHandler(self._handlers[0])
        for handler in self._handlers:
            handler.close()
        if self._test_handler is not None and self._test_descriptor is not None:
            _test_log.removeHandler(self._test_handler)
            os.close(self._test_descriptor)
            self._test_descriptor = None


def configure_logs(
    level: str, style: str, levels: Mapping[str, int] | None = None, test_log: Path | None = None
) -> Logs:
    """Sends the log to standard error.

    Args:
        level: least severe level that is logged.
        style: "text" or "json".
        levels: of single parts, from `parse_levels`.
        test_log: file for the access lines of calls that are marked as tests; None: they leave none.

    Raises:
        OSError: if that file can't be opened.
    """
    formatter = _JsonFormatter() if style == "json" else _TextFormatter(_TEXT)
    test_descriptor, test_handler = None, None
    if test_log is not None:
        # A named pipe without a reader is an error, then, instead of a start that waits for one
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        test_descriptor = os.open(test_log, flags, 0o640)
        test_handler = _LineHandler(test_descriptor, formatter)
        test_handler.writer.start()
        _test_log.addHandler(test_handler)
    # Closed at the start of the process, descriptor 2 may by now be anything
    handler = _LineHandler(None if sys.stderr is None else sys.stderr.fileno(), formatter)
    handler.writer.start()
    logging.getLogger("grpc._cython.cygrpc").addFilter(is_no_callers_doing)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for part, names in PARTS.items():
        for name in names:
            logging.getLogger(name).setLevel((levels or {}).get(part, logging.NOTSET))
    return Logs(handler, test_handler, test_descriptor)


# A header that is not UTF-8, with its bytes; a caller that left while its answer was on its way, or before there was
# one, with the path that it asked for (at level debug)
_CALLERS_DOINGS = ("Invalid encoding on", "ExecuteBatchError raised in core", "RPC cancelled for servicer method")


def is_no_callers_doing(record: logging.LogRecord) -> bool:
    """A filter for grpc's logger: it logs, some as errors or with a caller's bytes, what any caller can bring about."""
    return not (isinstance(record.msg, UnicodeDecodeError) or str(record.msg).startswith(_CALLERS_DOINGS))


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - part of logging's interface
        fields = "".join(f" {key}={_text(value)}" for key, value in getattr(record, "fields", {}).items())
        record.message = _printable(record.message) + fields
        return super().formatMessage(record)


def _text(value: object) -> str:
    text = str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _printable(text: str) -> str:
    """What comes from outside must neither make lines of its own nor move the terminal's cursor."""
    return text if text.isprintable() else text.translate(_CONTROL_CHARACTERS)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "file": record.filename,
            "line": record.lineno,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            file, number = raised_at(record.exc_info[1])
            line["exception"] = {
                "type": type(record.exc_info[1]).__qualname__,
                "file": file,
                "line": number,
                "traceback": self.formatException(record.exc_info),
            }
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, ensure_ascii=False, default=str)


def raised_at(error: BaseException) -> tuple[str, int]:
    """File, as its package knows it, and line that raised; of an exception that wasn't raised "" and 0."""
    traceback = error.__traceback__
    if traceback is None:
        return "", 0
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return short_path(traceback.tb_frame.f_code.co_filename), traceback.tb_lineno


def short_path(path: str) -> str:
    """A source file as people name it: without what differs from machine to machine."""
    return "/".join(Path(path).parts[-2:])


_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def caller_trace_id(call: CallRecord) -> str:
    """The trace that the caller's W3C context names, "" if it names none."""
    for key, value in call.metadata:
        if key == "traceparent" and isinstance(value, str) and (match := _TRACE_PARENT.fullmatch(value)):
            return match[1]
    return ""


class AccessLog:
    """One line a call. The line of a call that is marked as a test goes to the test log, if there is one."""

    def __init__(self, trace_id: Callable[[CallRecord], str] = caller_trace_id) -> None:
        """Keeps its argument.

        Args:
            trace_id: of a call, "" if it isn't traced.
        """
        self._trace_id = trace_id

    def begin(self, call: CallRecord) -> None:
        """Nothing is known that would be worth a line."""

    def end(self, call: CallRecord) -> None:
        """Writes the line."""
        log = _test_log if call.is_test else _access_log
        if log.isEnabledFor(logging.INFO):
            fields = _fields(call, self._trace_id(call))
            log.info("%s %s", call.method, fields["code"], extra={"fields": fields})


def _fields(call: CallRecord, trace_id: str) -> dict[str, str | int | float]:
    fields: dict[str, str | int | float] = {
        "method": call.method,
        "code": call.code or Code.UNKNOWN,
        "reason": call.reason,
        "model": call.model,
        "duration_ms": round(1000 * call.duration_s, 3),
        "queue_ms": round(1000 * call.queue_s, 3),
        "inference_ms": round(1000 * call.inference_s, 3),
        "sentences": call.sentences,
        "failed_sentences": call.failed_sentences,
        "tokens": call.tokens,
        "caller": call.caller,
        "peer": call.peer,
        "request_id": call.request_id,
        "trace_id": trace_id,
    }
    return {key: value for key, value in fields.items() if value != ""}
