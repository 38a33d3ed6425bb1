"""`embed`, `model_info` and `health` over real channels, both clients."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from bilm_client import Client, ClientClosedError, HealthStatus, RetryPolicy, ScalarMix, SentenceError, errors
from bilm_client._transport.link import Link
from bilm_client.testing import FakeModel
from grpc_health.v1 import health_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.scripted import Scripted
    from tests.unit.client.conftest import Connect

FAST = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_results_are_in_order_with_their_shapes(connect: Connect) -> None:
    results = connect().embed(["a  b c", ["x", "y"], []])
    assert [result.tokens for result in results] == [("a", "b", "c"), ("x", "y"), ()]
    assert [result.vectors.shape for result in results] == [(3, 3, 16), (3, 2, 16), (3, 0, 16)]
    assert [result.offsets for result in results] == [((0, 1), (3, 4), (5, 6)), None, None]
    assert {result.model_version for result in results} == {"fake-1"}


def test_a_str_is_one_sentence_and_no_sentence_no_call(connect: Connect, scripted: Scripted) -> None:
    client = connect()
    assert client.embed([]) == []
    assert scripted.service.get_model_count == 0
    assert [result.tokens for result in client.embed("one two")] == [("one", "two")]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", np.float32), ("float16", np.float16), ("bfloat16", np.float32)]
)
def test_number_formats(connect: Connect, dtype: str, kind: str) -> None:
    client = connect()
    [exact] = client.embed("a b", layers="top")
    [result] = client.embed("a b", layers="top", dtype=dtype)
    assert result.vectors.dtype == np.dtype(kind)
    assert not result.vectors.flags.writeable
    np.testing.assert_allclose(result.vectors, exact.vectors, rtol=2**-8)
    if dtype == "bfloat16":
        assert not (result.vectors.view(np.uint32) & 0xFFFF).any()


def test_tokens_that_the_client_knows_are_not_sent_back(connect: Connect, scripted: Scripted) -> None:
    client = connect()
    client.embed([["a"], ["b"]])
    client.embed([["a"], "b"])
    assert [request.options.omit_tokens for request in scripted.service.embed_requests] == [True, False]


def test_retries_until_it_works(connect: Connect, scripted: Scripted) -> None:
    scripted.fail_next(UNAVAILABLE)
    scripted.fail_next(EXHAUSTED, "OVERLOADED", 1)
    assert connect(retry=FAST).embed("a")[0].tokens == ("a",)
    assert len(scripted.service.embed_requests) == 3


def test_attempts_are_counted(connect: Connect, scripted: Scripted) -> None:
    scripted.fail_next(UNAVAILABLE, "SHUTTING_DOWN", times=5)
    with pytest.raises(errors.UnavailableError):
        connect(retry=RetryPolicy(max_attempts=3, initial_backoff_s=0.01)).embed("a")
    assert len(scripted.service.embed_requests) == 3


def test_one_attempt_means_no_retry(connect: Connect, scripted: Scripted) -> None:
    scripted.fail_next(UNAVAILABLE)
    with pytest.raises(errors.UnavailableError):
        connect(retry=RetryPolicy(max_attempts=1)).embed("a")
    assert len(scripted.service.embed_requests) == 1


def test_large_requests_are_retried_too(connect: Connect, scripted: Scripted) -> None:
    scripted.fail_next(UNAVAILABLE)
    token = "x" * 1_500_000
    connect(retry=FAST).embed([[token, token]], pool="mean")
    assert len(scripted.service.embed_requests) == 2
    assert scripted.service.embed_requests[0].ByteSize() > 2_900_000


def test_negative_pushback_stops_retries(connect: Connect, scripted: Scripted) -> None:
    scripted.fail_next(EXHAUSTED, "QUOTA", -1)
    with pytest.raises(errors.ResourceExhaustedError) as caught:
        connect(retry=FAST).embed("a")
    assert not isinstance(caught.value, errors.OverloadedError)
    assert len(scripted.service.embed_requests) == 1


def test_overload_says_how_long_to_wait(connect: Connect, scripted: Scripted) -> None:
    scripted.fail_next(EXHAUSTED, "OVERLOADED", 250)
    with pytest.raises(errors.OverloadedError) as caught:
        connect(retry=RetryPolicy(max_attempts=1)).embed("a")
    assert (caught.value.retry_after_ms, caught.value.reason) == (250, "OVERLOADED")


def test_large_inputs_are_split_and_joined(connect: Connect, scripted: Scripted) -> None:
    scripted.service.model.limits.max_sentences_per_request = 3
    sentences = [[f"t{index}"] for index in range(11)]
    results = connect().embed(sentences)
    assert [list(result.tokens) for result in results] == sentences
    requests = scripted.service.embed_requests
    assert sorted(len(request.sentences) for request in requests) == [2, 3, 3, 3]
    assert [request.expected_model_version for request in requests] == ["", "fake-1", "fake-1", "fake-1"]
    assert scripted.service.get_model_count == 1


@pytest.mark.parametrize("reason", ["RESPONSE_TOO_LARGE", "TOO_MANY_TOKENS"])
def test_a_part_that_was_too_much_is_halved(connect: Connect, scripted: Scripted, reason: str) -> None:
    code = EXHAUSTED if reason == "RESPONSE_TOO_LARGE" else grpc.StatusCode.INVALID_ARGUMENT
    scripted.fail_next(code, reason, -1, times=2)
    results = connect().embed(["a", "b", "c", "d", "e"])
    assert [result.tokens for result in results] == [("a",), ("b",), ("c",), ("d",), ("e",)]
    # the quarters and the other half go at once
    assert sorted(len(request.sentences) for request in scripted.service.embed_requests) == [1, 1, 2, 3, 5]


def test_a_sentence_that_fits_no_embed_goes_by_stream(connect: Connect, scripted: Scripted) -> None:
    scripted.service.model.limits.max_tokens_per_request = 4
    results = connect().embed([["a"], ["b"] * 9, ["c"], ["d"] * 5], return_states=True)
    assert [len(result.tokens) for result in results] == [1, 9, 1, 5]
    assert all(result.state for result in results)
    assert len(scripted.service.streams) == 1
    assert scripted.service.stream_ids(0) == [0, 1]
    assert scripted.service.streams[0][0].start.expected_model_version == "fake-1"


def test_a_failed_sentence_of_the_stream_keeps_its_place(connect: Connect, scripted: Scripted) -> None:
    scripted.service.model.limits.max_tokens_per_request = 4
    scripted.service.fake.failures["b b b b b b"] = "SENTENCE_TOO_LONG"
    results = connect().embed([["a"], ["b"] * 6, ["c"]], on_error="return")
    assert isinstance(results[1], SentenceError)
    assert (results[1].index, results[1].reason) == (1, "SENTENCE_TOO_LONG")


def test_a_sentence_larger_than_a_request_is_its_own_error(connect: Connect, scripted: Scripted) -> None:
    scripted.service.model.limits.max_request_bytes = 10_000
    sentences = [["a"], ["x" * 9_000], ["b"]]
    with pytest.raises(errors.RequestTooLargeError, match="sentence 1: REQUEST_TOO_LARGE"):
        connect().embed(sentences)
    results = connect().embed(sentences, on_error="return")
    assert isinstance(results[1], errors.RequestTooLargeError)
    assert [results[0].tokens, results[2].tokens] == [("a",), ("b",)]


def test_a_failed_sentence_raises_or_returns(connect: Connect, scripted: Scripted) -> None:
    scripted.service.fake.failures["bad one"] = "TOKEN_EMPTY"
    client = connect()
    with pytest.raises(SentenceError) as caught:
        client.embed(["good", "bad one"])
    assert (caught.value.index, caught.value.reason) == (1, "TOKEN_EMPTY")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    results = client.embed(["good", ["bad", "one"]], on_error="return")
    assert results[0].tokens == ("good",)
    assert isinstance(results[1], SentenceError)


def test_another_version_on_a_later_part(connect: Connect, scripted: Scripted) -> None:
    scripted.service.model.limits.max_sentences_per_request = 1
    scripted.answer_next()
    scripted.answer_next("fake-2")
    with pytest.raises(errors.ModelVersionChangedError, match="fake-2"):
        connect().embed(["a", "b"])


def test_a_version_refused_on_a_later_part(connect: Connect, scripted: Scripted) -> None:
    scripted.service.model.limits.max_sentences_per_request = 1
    scripted.answer_next()
    scripted.fail_next(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_VERSION_MISMATCH")
    with pytest.raises(errors.ModelVersionChangedError):
        connect().embed(["a", "b"])


def test_the_callers_version_refused(connect: Connect, scripted: Scripted) -> None:
    scripted.service.serve(FakeModel(version="mine"))
    scripted.fail_next(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_VERSION_MISMATCH")
    with pytest.raises(errors.ModelVersionError) as caught:
        connect(expected_model_version="mine").embed("a")
    assert type(caught.value) is errors.ModelVersionError
    assert scripted.service.embed_requests[0].expected_model_version == "mine"


def test_the_deadline_covers_the_call(connect: Connect, scripted: Scripted) -> None:
    hold = scripted.hold_next()
    client = connect()
    with pytest.raises(errors.DeadlineError):
        client.embed("a", timeout_s=0.2)
    hold.released.set()
    assert client.embed("a")[0].tokens == ("a",)


def test_too_few_results_are_malformed(connect: Connect, scripted: Scripted) -> None:
    scripted.service.embed_acts.append(lambda _request, _context: pb.EmbedResponse())
    with pytest.raises(errors.MalformedResponseError):
        connect().embed("a")


def test_a_wrong_number_of_mix_weights_is_told_before_sending(connect: Connect, scripted: Scripted) -> None:
    with pytest.raises(ValueError, match="mix must have 3 weights"):
        connect().embed("a", layers="mix", mix=ScalarMix([1.0, 2.0]))
    assert not scripted.service.embed_requests


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, errors.ModelNotFoundError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.AuthenticationError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.AuthenticationError),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.ModelVersionError),
        (grpc.StatusCode.INTERNAL, errors.ServiceError),
        (grpc.StatusCode.CANCELLED, errors.ServiceError),
    ],
)
def test_statuses_become_exceptions(
    connect: Connect, scripted: Scripted, code: grpc.StatusCode, kind: type[errors.ServiceError]
) -> None:
    scripted.fail_next(code, "SOME_REASON")
    with pytest.raises(errors.ServiceError) as caught:
        connect().embed("a")
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.reason, caught.value.message) == (code, "SOME_REASON", "as scripted")


def test_token_and_metadata_go_with_every_call(connect: Connect, scripted: Scripted) -> None:
    connect(token="secret", metadata=[("x-team", "nlp")]).embed("a")
    assert scripted.service.metadata["authorization"] == "Bearer secret"
    assert scripted.service.metadata["x-team"] == "nlp"


def test_model_info_asks_each_time(connect: Connect, scripted: Scripted) -> None:
    client = connect()
    assert client.model_info().limits.max_sentences_per_request == 1024
    scripted.service.model.version = "fake-2"
    assert client.model_info().version == "fake-2"


def test_health(connect: Connect, scripted: Scripted) -> None:
    client = connect()
    assert client.health() is HealthStatus.SERVING
    scripted.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    assert client.health() is HealthStatus.NOT_SERVING
    assert client.health("nobody") is HealthStatus.SERVICE_UNKNOWN


def test_an_unreachable_server(tmp_path: Path) -> None:
    client = Client(f"unix:{tmp_path}/nobody.sock", retry=FAST)
    with client, pytest.raises(errors.UnavailableError):
        client.health()
    with pytest.raises(ClientClosedError):
        client.health()


def test_a_closed_client_raises(connect: Connect) -> None:
    client = connect()
    client.embed("a")
    client.run(client.client.close())
    client.run(client.client.close())
    for call in (lambda: client.embed("a"), client.model_info, client.health, lambda: list(client.embed_stream(["a"]))):
        with pytest.raises(ClientClosedError):
            call()


def test_closing_ends_a_call_under_way(scripted: Scripted) -> None:
    hold = scripted.hold_next()
    client = Client(scripted.target)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.embed, "a")
        assert hold.arrived.wait(60)
        client.close()
        with pytest.raises(ClientClosedError):
            future.result(60)
        hold.released.set()


@pytest.fixture
def noted() -> Iterator[threading.Event]:
    """Set by the first SIGINT; the ones after it interrupt, also where the suite was started with SIGINT ignored.

    gRPC 1.85 can't cancel a call that an exception interrupts between its start and the wait for it. The thread that
    handles the first signal there goes on to the wait before another one can come: it keeps Python's lock until then.
    """
    event, interval_s = threading.Event(), sys.getswitchinterval()

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            signal.default_int_handler(number, frame)
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    sys.setswitchinterval(60)
    yield event
    sys.setswitchinterval(interval_s)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("coalesce_ms", [None, 5])
def test_an_interrupt_cancels_the_call(scripted: Scripted, noted: threading.Event, coalesce_ms: float | None) -> None:
    arrived, cancelled = threading.Event(), threading.Event()

    def act(_request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        context.add_callback(cancelled.set)
        arrived.set()
        cancelled.wait(60)
        return pb.EmbedResponse()

    def interrupt() -> None:
        assert arrived.wait(60)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)  # to the main thread, which embeds
            assert noted.wait(60)

    scripted.service.embed_acts.append(act)
    with Client(scripted.target, coalesce_ms=coalesce_ms) as client, ThreadPoolExecutor(1) as pool:
        interrupter = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.embed("a")
        interrupter.result(60)
        assert cancelled.wait(60)
        assert client.embed("a")[0].tokens == ("a",)


@pytest.mark.parametrize("call", [Link.stub, Link.health_stub])
def test_closing_in_a_signal_handler_while_the_channel_is_made_is_not_lost(
    scripted: Scripted, call: Callable[[Link], object]
) -> None:
    def new_channel() -> grpc.Channel:
        link.close()  # as the handler does, in the same thread
        return channel

    channel = grpc.insecure_channel(scripted.target)
    get_model = embed_pb2_grpc.EmbedServiceStub(channel).GetModel
    link = Link(new_channel, closed=False)
    with pytest.raises(ClientClosedError):
        call(link)
    with pytest.raises(ValueError, match="closed channel"):
        get_model(pb.GetModelRequest())


def test_many_threads_share_a_client(scripted: Scripted) -> None:
    with Client(scripted.target) as client, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: client.embed([[f"t{n}"]])[0].tokens, range(64)))
    assert results == [(f"t{n}",) for n in range(64)]


@pytest.mark.parametrize("scheme", ["unix:", "unix://"])
def test_unix_sockets(tmp_path: Path, scripted: Scripted, scheme: str) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    embed_pb2_grpc.add_EmbedServiceServicer_to_server(scripted.service, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    scripted.fail_next(UNAVAILABLE)
    with Client(f"{scheme}{tmp_path}/s", retry=FAST) as client:
        assert client.embed("a b")[0].tokens == ("a", "b")
    server.stop(None).wait()
