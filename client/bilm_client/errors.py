"""Every exception of the client, in one tree under `BilmError`.

BilmError
├── ClientClosedError            the client was closed
├── ForkedError                  a forked process can't use what its parent opened
├── MalformedResponseError       the server broke the contract
├── UnsupportedError             the server is too old for what is asked for
├── SentenceError                one sentence failed, the others didn't
│   └── RequestTooLargeError     no request can carry this sentence
└── ServiceError                 a call failed
    ├── InvalidRequestError      INVALID_ARGUMENT, OUT_OF_RANGE
    ├── ModelNotFoundError       NOT_FOUND
    ├── AuthenticationError      UNAUTHENTICATED, PERMISSION_DENIED
    ├── UnavailableError         UNAVAILABLE
    ├── DeadlineError            DEADLINE_EXCEEDED
    ├── ResourceExhaustedError   RESOURCE_EXHAUSTED that no waiting helps
    │   └── OverloadedError      RESOURCE_EXHAUSTED that passes
    └── ModelVersionError        FAILED_PRECONDITION
        └── ModelVersionChangedError
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import grpc
from bilm_api.constants import ERROR_DOMAIN, PUSHBACK_KEY, Reason
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

_INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]
_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class BilmError(Exception):
    """Base of all errors of this package. Bad arguments are ValueError or TypeError instead."""


class ClientClosedError(BilmError):
    """The client is closed, or was closed while the call was under way."""


class ForkedError(BilmError):
    """A stream or an AsyncClient was opened by another process, of which this one is a fork; open another one here."""


class MalformedResponseError(BilmError):
    """The server's response breaks the contract: a shape, a count or an order is wrong."""


class UnsupportedError(BilmError):
    """The server lacks a feature that the call needs, and the client can't do without."""


class SentenceError(BilmError):
    """One sentence failed.

    Attributes:
        index: Position of the sentence in the call's input, from 0.
        reason: The stable reason, UPPER_SNAKE_CASE, or "" where none was given.
        code: The gRPC status code.
        message: What went wrong, for people to read.
    """

    def __init__(
        self, message: str, *, index: int = -1, reason: str = "", code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    ) -> None:
        super().__init__(message)
        self.message = message
        self.index = index
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        return f"sentence {self.index}: {self.reason or self.code.name}: {self.message}"


class RequestTooLargeError(SentenceError):
    """A sentence is larger than the largest request; nothing was sent for it."""


class ServiceError(BilmError):
    """A call failed.

    Attributes:
        code: The gRPC status code.
        reason: The stable reason of the server, UPPER_SNAKE_CASE, or "" where gRPC itself made the status.
        message: What went wrong, for people to read.
        metadata: Details of the reason, as the server's ErrorInfo gives them.
        pushback_ms: Milliseconds that the server asks to wait before another attempt; negative: don't try again;
            None: it gave no time.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        pushback_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.pushback_ms = pushback_ms

    def __str__(self) -> str:
        return f"{self.code.name}{f' ({self.reason})' if self.reason else ''}: {self.message}"


class InvalidRequestError(ServiceError):
    """The request as a whole is wrong (INVALID_ARGUMENT, OUT_OF_RANGE)."""


class ModelNotFoundError(ServiceError):
    """The server has no model of that name (NOT_FOUND)."""


class AuthenticationError(ServiceError):
    """The token is missing, wrong or not allowed this call (UNAUTHENTICATED, PERMISSION_DENIED)."""


class UnavailableError(ServiceError):
    """The server can't be reached or is going away (UNAVAILABLE), retries included."""


class DeadlineError(ServiceError):
    """The deadline passed (DEADLINE_EXCEEDED)."""


class ResourceExhaustedError(ServiceError):
    """The request exceeds a limit (RESOURCE_EXHAUSTED), and the same request later would too."""


class OverloadedError(ResourceExhaustedError):
    """The server has too much to do (RESOURCE_EXHAUSTED with a time to wait), retries included."""

    @property
    def retry_after_ms(self) -> int:
        """Milliseconds that the server asks to wait before another attempt."""
        return self.pushback_ms or 0


class ModelVersionError(ServiceError):
    """The server has another version of the model than the one expected (FAILED_PRECONDITION)."""


class ModelVersionChangedError(ModelVersionError):
    """The model's version changed in the middle of a call that needs one version throughout."""


class _Call(Protocol):
    """A finished call or its exception, sync or async."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


_CLASSES: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: ModelVersionError,
}


def service_error(call: _Call) -> ServiceError:
    """Return the exception for a call that failed; takes a grpc.RpcError of either API, or the call itself."""
    code = call.code()
    reason, metadata = _error_info(_details_of(call))
    pushback_ms = _pushback_ms(call.trailing_metadata() or ())
    cls = _CLASSES.get(code, ServiceError)
    if cls is ResourceExhaustedError and pushback_ms is not None and pushback_ms >= 0:
        cls = OverloadedError
    return cls(call.details() or "", code=code, reason=reason, metadata=metadata, pushback_ms=pushback_ms)


def sentence_error(status: status_pb2.Status, index: int) -> SentenceError:
    """Return the exception for a sentence's `google.rpc.Status`."""
    reason, _ = _error_info(status)
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    return SentenceError(status.message, index=index, reason=reason, code=code)


def error_status(reason: str, message: str, code: int = _INVALID_ARGUMENT) -> status_pb2.Status:
    """Return a status as the server makes it, with the reason among the details."""
    detail = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(domain=ERROR_DOMAIN, reason=reason))
    return status_pb2.Status(code=code, message=message, details=[detail])


def version_changed(expected: str, found: str) -> ModelVersionChangedError:
    """Return the exception for a model version that changed from `expected` to `found` during a call."""
    return ModelVersionChangedError(
        f"the model's version changed during the call: expected {expected!r}, found {found!r}",
        code=grpc.StatusCode.FAILED_PRECONDITION,
        reason=Reason.MODEL_VERSION_MISMATCH.value,
        metadata={"expected": expected, "found": found},
    )


def ended_early() -> ServiceError:
    """Return the error for a server that ends a stream in good order; one only if results are still due."""
    return UnavailableError("the server ended the stream before all results had come", code=grpc.StatusCode.UNAVAILABLE)


def _details_of(call: _Call) -> status_pb2.Status | None:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(call)  # type: ignore[arg-type]
    except (ValueError, DecodeError):
        # A proxy rewrote the status: the outer code and text are what holds then.
        return None
    return status


def _error_info(status: status_pb2.Status | None) -> tuple[str, dict[str, str]]:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return info.reason, dict(info.metadata)
    return "", {}


def _pushback_ms(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> int | None:
    for key, value in trailing_metadata:
        if key == PUSHBACK_KEY:
            try:
                return int(value)
            except ValueError:
                return -1  # as gRPC does: what can't be read means stop
    return None
