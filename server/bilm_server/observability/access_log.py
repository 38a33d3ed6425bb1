"""The access log: one line a call."""

import logging
import re
from collections.abc import Callable

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


class AccessLog:
    """One line a call. The line of a call that is marked as a test goes to the test log, if there is one."""

    def __init__(self, trace_id: Callable[[CallRecord], str] = caller_trace_id) -> None:
        """Keep what finds traces.

        Args:
            trace_id: returns that of a call, "" if it isn't traced.
        """
        self._trace_id = trace_id

    def begin(self, call: CallRecord) -> None:
        """Do nothing: the line is written at the end."""

    def end(self, call: CallRecord) -> None:
        """Write the line."""
        log = test_calls if call.is_test else _log
        if log.isEnabledFor(logging.INFO):
            fields = _fields(call, self._trace_id(call))
            arguments, extra = (call.method, fields["code"]), {"fields": fields}
            # `log.info` would look for the caller's file and line at each call
            log.handle(log.makeRecord(log.name, logging.INFO, __file__, _LINE, "%s %s", arguments, None, extra=extra))


_LINE = AccessLog.end.__code__.co_firstlineno


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
