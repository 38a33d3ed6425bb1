"""Every way to refuse, in one table: a stable reason, its status, and whether a retry can help."""

from functools import lru_cache
from typing import Final

import grpc
from bilm_api.constants import (
    ERROR_DOMAIN,
    ERROR_INFO_REQUEST_ID,
    NEVER_RETRY,
    PUSHBACK_KEY,
    STATUS_DETAILS_KEY,
    Reason,
)
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

_CODES: Final = {
    Reason.METHOD_NOT_FOUND: grpc.StatusCode.UNIMPLEMENTED,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.MODEL_VERSION_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.RESPONSE_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.CALLER_LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.STREAM_STALLED: grpc.StatusCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
    Reason.MODEL_FAILING: grpc.StatusCode.UNAVAILABLE,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}


class RefusalError(Exception):
    """A request or a sentence that is refused; the message is meant for the caller and never quotes their text.

    Attributes:
        reason: why.
        retry_after_ms: for RESOURCE_EXHAUSTED, when to try again; `NEVER_RETRY` where that can't help.
    """

    def __init__(self, reason: Reason, message: str, retry_after_ms: int = NEVER_RETRY) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_ms = retry_after_ms

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status; INVALID_ARGUMENT for everything that the table doesn't name."""
        return _CODES.get(self.reason, grpc.StatusCode.INVALID_ARGUMENT)

    def status(self, request_id: str = "") -> status_pb2.Status:
        """Return a `google.rpc.Status` with the reason, and the caller's name of the call, among the details."""
        info = any_pb2.Any()
        metadata = {ERROR_INFO_REQUEST_ID: request_id} if request_id else {}
        info.Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN, metadata=metadata))
        return status_pb2.Status(code=code_pb2.Code.Value(self.code.name), message=str(self), details=[info])

    def trailing_metadata(self, request_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
        """Return what goes with the status of a whole call.

        Every RESOURCE_EXHAUSTED carries a pushback, because clients list that code as retryable.
        """
        # Under overload the same refusal is sent again and again; one with a request's own name is never the same
        status = self.status(request_id).SerializeToString() if request_id else _status_bytes(self.reason, str(self))
        details: tuple[str, str | bytes] = (STATUS_DETAILS_KEY, status)
        if self.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return (details,)
        return (details, (PUSHBACK_KEY, str(self.retry_after_ms)))


@lru_cache(maxsize=64)
def _status_bytes(reason: Reason, message: str) -> bytes:
    data: bytes = RefusalError(reason, message).status().SerializeToString()
    return data


class CallerGoneError(Exception):
    """A result could not be sent, because the call is over for its caller; there is nobody to tell."""


def internal_error() -> RefusalError:
    """What callers hear of an error that is ours: nothing of the inside."""
    return RefusalError(Reason.INTERNAL, "internal error; the server's log has the details")
