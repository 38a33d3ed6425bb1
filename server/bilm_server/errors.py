"""Every way to refuse or to fail: reasons with their status codes in one table, and what ends the process.

Knows no protocol: a door makes its own status of a code, as `protocols.grpc.status` does for gRPC.
"""

from enum import StrEnum
from typing import Final

from bilm_api.constants import NEVER_RETRY, Reason


class Code(StrEnum):
    """Canonical status codes, by their names in `google.rpc.Code`."""

    OK = "OK"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


_CODES: Final = {
    Reason.METHOD_NOT_FOUND: Code.UNIMPLEMENTED,
    Reason.MODEL_NOT_FOUND: Code.NOT_FOUND,
    Reason.MODEL_VERSION_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.RESPONSE_TOO_LARGE: Code.RESOURCE_EXHAUSTED,
    Reason.OVERLOADED: Code.RESOURCE_EXHAUSTED,
    Reason.CALLER_LIMIT: Code.RESOURCE_EXHAUSTED,
    Reason.UNAUTHENTICATED: Code.UNAUTHENTICATED,
    Reason.DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
    Reason.STREAM_STALLED: Code.UNAVAILABLE,
    Reason.SHUTTING_DOWN: Code.UNAVAILABLE,
    Reason.MODEL_FAILING: Code.UNAVAILABLE,
    Reason.INTERNAL: Code.INTERNAL,
    Reason.MODEL_LOADING: Code.UNAVAILABLE,
    Reason.RIGHT_MISSING: Code.PERMISSION_DENIED,
    Reason.RELOAD_FAILED: Code.FAILED_PRECONDITION,
}


class RefusalError(Exception):
    """A request or a sentence is refused. The message is meant for the caller and never quotes a sentence.

    Attributes:
        reason: why.
        retry_after_ms: for RESOURCE_EXHAUSTED, when to try again; `NEVER_RETRY` where that can't help. For other codes
            it is sent where it is a time.
    """

    def __init__(self, reason: Reason, message: str, retry_after_ms: int = NEVER_RETRY) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_ms = retry_after_ms

    @property
    def code(self) -> Code:
        """The status code; INVALID_ARGUMENT for every reason that the table doesn't name."""
        return _CODES.get(self.reason, Code.INVALID_ARGUMENT)


class CallerGoneError(Exception):
    """A result can't be sent, because the call is over for its client."""


class ConfigurationError(Exception):
    """The configuration, or something that it names, can't be used; the message has one error a line."""


class BindError(Exception):
    """An address can't be listened on."""


class EngineLostError(Exception):
    """The engine won't recover in this process; the message names the cause."""


def internal_error() -> RefusalError:
    """Return the refusal for an error of the server's own; it shows nothing of the inside."""
    return RefusalError(Reason.INTERNAL, "internal error; the server's log has the details")
