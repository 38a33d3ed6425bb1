"""What a call over HTTP has for a request and for a response, and how a refusal is written as one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import orjson
from bilm_api.constants import NEVER_RETRY, Reason

from bilm_server.errors import Code, RefusalError

JSON: Final = "application/json"
STATUSES: Final = {
    Code.OK: 200,
    Code.INVALID_ARGUMENT: 400,
    Code.FAILED_PRECONDITION: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.UNIMPLEMENTED: 404,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
"""HTTP's status for each canonical code that a refusal may have."""

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


@dataclass(frozen=True)
class HttpRequest:
    """A request that was let in, with its whole body.

    Attributes:
        headers: by lower-case name; of several with one name, the last.
        body: JSON, or nothing.
        deadline_s: when the call must have ended, on `time.monotonic`.
        tail: what the path has behind that of its route.
    """

    headers: Mapping[str, str]
    body: bytes
    deadline_s: float
    tail: str = ""


@dataclass(frozen=True)
class HttpResponse:
    """A response.

    Attributes:
        body: its bytes.
        status: its code.
        content_type: of the body.
        headers: beside those that every response has.
    """

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpRefusalError(RefusalError):
    """A refusal that HTTP has a status of its own for, or that names a field.

    Attributes:
        status: code of the response; None: that of the refusal's code.
        field: path of the field at fault, "" if there is none.
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: Reason = Reason.MALFORMED_REQUEST,
        status: int | None = None,
        field: str = "",
        headers: Mapping[str, str] | None = None,
        retry_after_ms: int = NEVER_RETRY,
    ) -> None:
        super().__init__(reason, message, retry_after_ms)
        self.status, self.field, self.headers = status, field, headers or {}


def method_refused(expected: str) -> HttpRefusalError:
    """Return the refusal of a method that a path doesn't have."""
    return HttpRefusalError(
        f"method: expected {expected}",
        reason=Reason.METHOD_NOT_FOUND,
        status=405,
        headers={"allow": expected},
    )


def error_object(refusal: RefusalError) -> dict[str, object]:
    """Return a refusal as OpenAI's clients read errors; `code` is the reason."""
    status = status_of_refusal(refusal)
    return {
        "message": str(refusal),
        "type": _TYPES.get(status, "invalid_request_error"),
        "param": (refusal.field if isinstance(refusal, HttpRefusalError) else "") or None,
        "code": refusal.reason.value,
    }


def refused(refusal: RefusalError) -> HttpResponse:
    """Return the response of a call that is refused as a whole."""
    status = status_of_refusal(refusal)
    headers = dict(refusal.headers) if isinstance(refusal, HttpRefusalError) else {}
    if refusal.retry_after_ms != NEVER_RETRY:
        headers["retry-after-ms"] = str(refusal.retry_after_ms)
        headers["retry-after"] = str(math.ceil(refusal.retry_after_ms / 1000))
    elif refusal.code is Code.RESOURCE_EXHAUSTED:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return HttpResponse(orjson.dumps({"error": error_object(refusal)}), status, headers=headers)


def status_of_refusal(refusal: RefusalError) -> int:
    """Return the status code of a refusal's response."""
    own = refusal.status if isinstance(refusal, HttpRefusalError) else None
    return own or STATUSES.get(refusal.code, 500)
