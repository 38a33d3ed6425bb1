"""Exceptions from statuses."""

import pickle
from typing import Any

import grpc
import pytest
from bilm_api.constants import PUSHBACK_KEY
from bilm_client import errors
from bilm_client.errors import error_status
from google.rpc import status_pb2


class FinishedCall:
    def __init__(
        self, code: grpc.StatusCode, details: str | None, metadata: tuple[tuple[str, str | bytes], ...]
    ) -> None:
        self._values = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._values[0]

    def details(self) -> str | None:
        return self._values[1]

    def trailing_metadata(self) -> Any:
        return self._values[2]


def test_details_that_a_proxy_rewrote_do_not_hide_the_status() -> None:
    status = error_status("TOKEN_EMPTY", "inner", code=3).SerializeToString()
    for details in (status, b"\xff not a status"):
        call = FinishedCall(grpc.StatusCode.UNAVAILABLE, "outer", (("grpc-status-details-bin", details),))
        error = errors.service_error(call)
        assert type(error) is errors.UnavailableError
        assert (error.message, error.reason) == ("outer", "")


def test_a_pushback_that_cannot_be_read_means_stop() -> None:
    call = FinishedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, None, ((PUSHBACK_KEY, "soon"),))
    error = errors.service_error(call)
    assert type(error) is errors.ResourceExhaustedError
    assert error.pushback_ms == -1


def test_a_sentences_status() -> None:
    error = errors.sentence_error(error_status("TOKEN_EMPTY", "token 2 is empty"), 7)
    assert str(error) == "sentence 7: TOKEN_EMPTY: token 2 is empty"
    assert errors.sentence_error(status_pb2.Status(code=99), 0).code is grpc.StatusCode.UNKNOWN


def test_reasons_of_other_domains_are_not_ours() -> None:
    status = error_status("X", "m")
    foreign = status_pb2.Status(code=3, message="m")
    foreign.details.add(type_url=status.details[0].type_url, value=status.details[0].value.replace(b"bilm", b"blim"))
    assert errors.sentence_error(foreign, 0).reason == ""


@pytest.mark.parametrize(
    "error",
    [
        errors.SentenceError("m", index=3, reason="R", code=grpc.StatusCode.INTERNAL),
        errors.OverloadedError("m", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="R", pushback_ms=5),
        errors.ClientClosedError("m"),
    ],
)
def test_exceptions_cross_processes(error: errors.BilmError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
