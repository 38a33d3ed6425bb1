"""A short run of the fuzzers, the same each time; `make fuzz` is the long one. And: that they see what is wrong."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bilm_api.constants import Reason
from bilm_server.embedding.preprocessing import Preprocessing
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Sentence

from tests.security.fuzz_fields import JSON_KIND, input_of, new_check
from tests.security.fuzz_frames import Case
from tests.security.fuzz_http1 import HttpCase, HttpReply, MalformedResponseError, Response, read_responses
from tests.security.fuzz_http2 import Reply
from tests.security.fuzz_json import chosen_body, embed_body
from tests.security.fuzz_run import KINDS, AnyCase, Report, complaints, fuzz_server, new_case

_ROUNDS, _INPUTS_IN_PROCESS = 6, 400


@pytest.fixture(scope="module")
def report() -> Report:
    return fuzz_server(seed=7, rounds=range(_ROUNDS), end_s=time.monotonic() + 300)


def test_connections_that_go_wrong(report: Report) -> None:
    assert report.complaints == []
    assert report.inputs == Counter({function.__name__: _ROUNDS for function in KINDS})


def test_the_inputs_lead_somewhere(report: Report) -> None:
    """Not all of them to the same end."""
    assert {"OK", "INVALID_ARGUMENT", "UNAVAILABLE", "reset", "INTERNAL"} <= report.statuses.keys()
    assert {"HTTP 200", "HTTP 400", "HTTP 404", "HTTP 415", "HTTP 421"} <= report.statuses.keys()


def test_requests_that_are_almost_right() -> None:
    check, rng = new_check(), random.Random(7)
    outcomes = Counter(check(input_of(rng)) for _ in range(_INPUTS_IN_PROCESS))
    assert outcomes["prepared"] > _INPUTS_IN_PROCESS // 10
    assert len(outcomes) > 8, outcomes


@pytest.mark.parametrize("new_body", [embed_body, chosen_body])
def test_what_is_mutated_is_right_itself(new_body: Callable[[], dict[str, Any]]) -> None:
    assert new_check()(bytes([JSON_KIND]) + json.dumps(new_body()).encode()) == "prepared"


class CarelessPreprocessing(Preprocessing):
    """Lets empty tokens pass."""

    def prepare(self, sentence: Sentence) -> None:
        try:
            super().prepare(sentence)
        except RefusalError as error:
            if error.reason is not Reason.TOKEN_EMPTY:
                raise


def test_a_bug_in_the_checks_is_seen() -> None:
    check, rng = new_check(CarelessPreprocessing), random.Random(7)
    with pytest.raises(AssertionError):
        Counter(check(input_of(rng)) for _ in range(10_000))


@pytest.mark.parametrize("function", KINDS, ids=lambda function: function.__name__)
def test_an_input_can_be_made_again(function: Callable[[random.Random], AnyCase]) -> None:
    kind = KINDS.index(function)
    assert new_case(1, kind, 3) == new_case(1, kind, 3)
    assert len({new_case(1, kind, number).data for number in range(20)}) > 5
    assert max(len(new_case(1, kind, number).data) for number in range(20)) < 2**20


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (Reply(statuses={1: (0, "")}, ended={1}), "still open"),
        (Reply(closed=True), "has no status"),
        (Reply(statuses={1: (2, "")}, ended={1}, closed=True), "UNKNOWN"),
        (
            Reply(statuses={1: (13, "internal error; the server's log has the details")}, ended={1}, closed=True),
            "INTERN",
        ),
    ],
    ids=["open", "no status", "unknown", "internal"],
)
def test_a_bad_reply_is_seen(reply: Reply, complaint: str) -> None:
    assert complaint in "".join(complaints(Case(b"", (1,)), reply))


REQUEST = HttpCase(b"", 1)
INTERNAL = b'{"error":{"code":"INTERNAL","message":"internal error; the server\'s log has the details"}}'


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (HttpReply([Response(200, {}, b"")]), "still open"),
        (HttpReply(closed=True), "0 responses to 1 requests"),
        (HttpReply([Response(500, {}, b"")], closed=True), "has the status 500"),
        (HttpReply([Response(200, {"content-type": "application/json"}, b"{")], closed=True), "isn't JSON"),
        (HttpReply([Response(400, {"content-type": "application/json"}, INTERNAL)], closed=True), "INTERNAL"),
        (HttpReply([Response(200, {}, b"")], "no head", closed=True), "no head"),
    ],
    ids=["open", "no response", "status", "no JSON", "internal", "malformed"],
)
def test_a_bad_response_is_seen(reply: HttpReply, complaint: str) -> None:
    assert complaint in "".join(complaints(REQUEST, reply))


def test_responses_are_read_strictly() -> None:
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    of_head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    found = list(read_responses(b"HTTP/1.1 100 \r\n\r\n" + whole + of_head + whole + whole[:-1], closed=False))
    assert [response.body for response in found] == [b"ok", b"", b"ok"]
    for bad in (b"HTTP/1.0 200 OK\r\n\r\n", whole + b"more\r\n\r\n", b"HTTP/1.1 200 OK\r\nno header\r\n\r\n"):
        with pytest.raises(MalformedResponseError):
            list(read_responses(bad, closed=True))


def test_findings_are_saved(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    found = fuzz_server(
        seed=7, rounds=range(1), end_s=time.monotonic() + 300, failures=path, judge=lambda *_: ["found"]
    )
    assert len(found.complaints) == len(path.read_text(encoding="utf-8").splitlines()) == len(KINDS)
