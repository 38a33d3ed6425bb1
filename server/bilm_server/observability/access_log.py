"""The access log: one line a call."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bilm_api.constants import Priority

from bilm_server.errors import Code
from bilm_server.observability.call_record import CallRecord

_log = logging.getLogger(__name__)
test_calls = logging.getLogger("bilm_server.test")
"""Takes the lines of calls that are kept out of the access log; without a file of its own, they go nowhere."""
test_calls.propagate = False

_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def caller_trace_id(call: CallRecord) -> str:
    """Return the trace that the client's W3C context names, "" if it names none."""
    for key, value in call.metadata:
        if key == "traceparent" and isinstance(value, str) and (match := _TRACE_PARENT.fullmatch(value)):
            return match[1]
    return ""


Value = str | int | float


class Fields(Mapping[str, Value]):
    """What a line says of a call: taken when the call ends, named and rounded when the line is formatted."""

    __slots__ = ("_found", "_taken")

    def __init__(self, call: CallRecord, trace_id: str) -> None:
        self._taken = (
            call.method, call.code or Code.UNKNOWN, call.reason, call.model, call.duration_s, call.queue_s,
            call.inference_s, call.sentences, call.failed_sentences, call.tokens,
            "" if call.priority is Priority.INTERACTIVE else call.priority.value, call.caller, call.peer,
            call.request_id, trace_id,
        )  # fmt: skip
        self._found: dict[str, Value] | None = None

    def __getitem__(self, key: str) -> Value:
        return self._named()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named())

    def __len__(self) -> int:
        return len(self._named())

    def _named(self) -> dict[str, Value]:
        if self._found is None:
            values = (_rounded_ms(value) if isinstance(value, float) else value for value in self._taken)
            self._found = {key: value for key, value in zip(_KEYS, values, strict=True) if value != ""}
        return self._found


_KEYS = (
    "method", "code", "reason", "model", "duration_ms", "queue_ms", "inference_ms", "sentences", "failed_sentences",
    "tokens", "priority", "caller", "peer", "request_id", "trace_id",
)  # fmt: skip


def _rounded_ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


class AccessLog:
    """One line a call. The line of a call that is marked as a test goes to the test log, if there is one."""

    def __init__(self, trace_id: Callable[[CallRecord], str] = caller_trace_id) -> None:
        """Keep what finds traces.

        Args:
            trace_id: returns that of a call, "" if it isn't traced.
        """
        self._trace_id = trace_id
        self._shared: dict[logging.Logger, dict[str, Any]] = {}

    def begin(self, call: CallRecord) -> None:
        """Do nothing: the line is written at the end."""

    def end(self, call: CallRecord) -> None:
        """Write the line."""
        log = test_calls if call.is_test else _log
        if log.isEnabledFor(logging.INFO):
            log.handle(self._record(log, call))

    def _record(self, log: logging.Logger, call: CallRecord) -> logging.LogRecord:
        """Return a record as `log.info` makes it, which would look for file, line, thread and process at each call."""
        shared = self._shared.get(log)
        if shared is None:
            made = log.makeRecord(log.name, logging.INFO, __file__, _LINE, "%s %s", (), None)
            shared = self._shared[log] = vars(made)
        now_s = time.time()
        record = object.__new__(logging.LogRecord)
        vars(record).update(
            shared,
            args=(call.method, call.code or Code.UNKNOWN),
            created=now_s,
            msecs=int((now_s - int(now_s)) * 1000) + 0.0,
            relativeCreated=shared["relativeCreated"] + 1000 * (now_s - shared["created"]),
            fields=Fields(call, self._trace_id(call)),
        )
        return record


_LINE = AccessLog.end.__code__.co_firstlineno
