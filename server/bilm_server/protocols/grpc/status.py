"""Refusals as gRPC sends them: `google.rpc.Status`, its code, and the trailing metadata of a call."""

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

from bilm_server.errors import Code, RefusalError

STATUS_CODES: Final = {code: grpc.StatusCode[code.name] for code in Code}
"""gRPC's code for each canonical one."""


def status_of(refusal: RefusalError, request_id: str = "") -> status_pb2.Status:
    """Return a `google.rpc.Status` with the reason, and the client's own name of the call, among the details."""
    info = any_pb2.Any()
    metadata = {ERROR_INFO_REQUEST_ID: request_id} if request_id else {}
    info.Pack(error_details_pb2.ErrorInfo(reason=refusal.reason, domain=ERROR_DOMAIN, metadata=metadata))
    return status_pb2.Status(code=code_pb2.Code.Value(refusal.code.name), message=str(refusal), details=[info])


def trailing_metadata(refusal: RefusalError, request_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
    """Return what goes with the status of a whole call.

    Every RESOURCE_EXHAUSTED carries a pushback, because clients list that code as retryable; another refusal does where
    it names a time.
    """
    # Under overload the same refusal is sent again and again; one with a request's own name is never the same
    status = _status_bytes(refusal.reason, str(refusal)) if not request_id else _serialised(refusal, request_id)
    details: tuple[str, str | bytes] = (STATUS_DETAILS_KEY, status)
    if refusal.code is not Code.RESOURCE_EXHAUSTED and refusal.retry_after_ms == NEVER_RETRY:
        return (details,)
    return (details, (PUSHBACK_KEY, str(refusal.retry_after_ms)))


@lru_cache(maxsize=64)
def _status_bytes(reason: Reason, message: str) -> bytes:
    return _serialised(RefusalError(reason, message))


def _serialised(refusal: RefusalError, request_id: str = "") -> bytes:
    data: bytes = status_of(refusal, request_id).SerializeToString()
    return data
