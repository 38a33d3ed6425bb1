"""`embed_stream` over real channels, both clients."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import Client, ClientClosedError, RetryPolicy, SentenceError, errors
from bilm_client.testing import FakeClient
from bilm_client.testing.service import FakeStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.scripted import Scripted
    from tests.unit.client.conftest import Connect

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def sentences(count: int) -> list[list[str]]:
    return [[f"t{number}", "x"] for number in range(count)]


def expected(count: int, **options: Any) -> list[Any]:
    with FakeClient() as client:
        return list(client.embed_stream(sentences(count), **options))


def check_same(found: list[Any], wanted: list[Any]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert [one.state for one in found] == [one.state for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.vectors, other.vectors)


def test_results_in_input_order(connect: Connect, scripted: Scripted) -> None:
    def backwards(requests: Iterator[pb.EmbedStreamRequest], _context: Any) -> Iterator[pb.EmbedStreamResponse]:
        stream = FakeStream(scripted.service.fake, next(requests).start)
        while items := list(itertools.islice(requests, 4)):
            yield from (stream.answer(request.item) for request in reversed(items))

    scripted.service.stream_acts.append(backwards)
    check_same(list(connect().embed_stream(sentences(12), window=4)), expected(12))


@pytest.mark.parametrize("count", [0, 1, 200])
def test_any_number_of_sentences(connect: Connect, scripted: Scripted, count: int) -> None:
    check_same(list(connect().embed_stream(iter(sentences(count)))), expected(count))
    assert len(scripted.service.streams) == (count > 0)


def test_the_input_is_read_no_further_than_the_window(connect: Connect) -> None:
    read: list[list[str]] = []
    source = (read.append(sentence) or sentence for sentence in sentences(50))  # type: ignore[func-returns-value]
    for taken, _ in enumerate(connect().embed_stream(source, window=5)):
        assert len(read) - taken <= 5
    assert len(read) == 50


def test_row_ranges_are_joined(connect: Connect, scripted: Scripted) -> None:
    def in_ranges(requests: Iterator[pb.EmbedStreamRequest], _context: Any) -> Iterator[pb.EmbedStreamResponse]:
        stream = FakeStream(scripted.service.fake, next(requests).start)
        for request in requests:
            yield from cut(stream.answer(request.item), 2)

    scripted.service.stream_acts.append(in_ranges)
    text = "a  bé c d e"
    [found] = connect().embed_stream([text], dtype="float16", return_states=True)
    with FakeClient() as fake:
        [wanted] = fake.embed(text, dtype="float16", return_states=True)
    check_same([found], [wanted])
    assert found.offsets == wanted.offsets
    assert not found.vectors.flags.writeable


def cut(response: pb.EmbedStreamResponse, rows: int) -> Iterator[pb.EmbedStreamResponse]:
    """A whole result of all layers of float16, in ranges of `rows` rows."""
    whole = response.rows.embedding
    layers, total, width = whole.tensor.shape
    values = np.frombuffer(whole.tensor.data, "<f2").reshape(layers, total, width)
    for first in range(0, total, rows):
        part = slice(first, first + rows)
        last = first + rows >= total
        vectors = values[:, part]
        embedding = pb.Embedding(
            tokens=whole.tokens[part],
            token_starts=whole.token_starts[part],
            token_ends=whole.token_ends[part],
            tensor=pb.Tensor(data=vectors.tobytes(), shape=vectors.shape, data_type=pb.DATA_TYPE_FLOAT16),
            state=whole.state if last else b"",
        )
        message = pb.EmbeddingRows(embedding=embedding, first_row=first, total_rows=total, last=last)
        yield pb.EmbedStreamResponse(id=response.id, rows=message, usage=response.usage if last else None)


def test_a_broken_stream_resumes_what_is_unfinished(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.extend([service.answer_then_fail(3), service.answer_then_fail(2)])
    check_same(list(connect().embed_stream(sentences(20), window=4)), expected(20))
    assert len(service.streams) == 3
    assert service.stream_ids(1)[0] == 3
    assert service.stream_ids(2)[0] == 5
    assert service.streams[2][0].start.expected_model_version == "fake-1"


def test_carried_states_survive_breaks(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.extend([service.answer_then_fail(6), service.answer_then_fail(1), service.answer_then_fail(7)])
    with FakeClient() as fake:
        [start] = fake.embed("before", return_states=True)
    options: dict[str, Any] = {"carry_state": True, "initial_state": start.state, "return_state_every": 4}
    found = list(connect().embed_stream(sentences(20), window=3, **options))
    check_same(found, expected(20, **options))
    assert [index for index, one in enumerate(found) if one.state] == [3, 7, 11, 15, 19]
    # the first six had results, the state before number 4 was the last one returned
    assert service.stream_ids(1)[0] == 4
    assert service.streams[1][1].item.sentence.state == found[3].state
    assert service.stream_ids(2)[0] == 4


def test_a_failed_sentence_does_not_lose_the_states(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.fake.failures["t1 x"] = "TOKEN_EMPTY"
    service.stream_acts.append(service.answer_then_fail(4))
    found = list(
        connect().embed_stream(sentences(8), window=1, carry_state=True, return_state_every=2, on_error="return")
    )
    assert isinstance(found[1], SentenceError)
    # number 1 owed the state, number 2 brings it instead, and the caller sees only the states it asked for
    asked = [request.item.sentence.return_state for request in service.streams[0][1:]]
    assert asked == [False, True, True, True, False]
    assert [index for index, one in enumerate(found) if index != 1 and one.state] == [3, 5, 7]


def test_attempts_are_counted_and_waited_for(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.extend([service.answer_then_fail(0)] * 9)
    client = connect(retry=RetryPolicy(max_attempts=4, initial_backoff_s=0.5, max_backoff_s=1.5))
    with pytest.raises(errors.UnavailableError):
        list(client.embed_stream(sentences(3)))
    assert client.delays_s == [0.5, 1.0, 1.5]
    assert len(service.streams) == 4


def test_progress_starts_the_count_anew(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.extend([service.answer_then_fail(1)] * 9)
    client = connect(retry=RetryPolicy(max_attempts=2))
    check_same(list(client.embed_stream(sentences(12), window=2)), expected(12))
    # More than nine where gRPC loses an answer to the failure behind it; a count that went on would end the stream
    assert set(client.delays_s) == {0.1}
    assert len(client.delays_s) >= 9


def test_reading_again_is_no_progress(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.extend([service.answer_then_fail(2), *[service.answer_then_fail(1)] * 20])
    client = connect(retry=RetryPolicy(max_attempts=3))
    with pytest.raises(errors.UnavailableError):
        list(client.embed_stream(sentences(6), carry_state=True))
    assert len(service.streams) == 3


def test_pushback_takes_the_place_of_the_backoff(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.extend(
        [service.answer_then_fail(1, EXHAUSTED, 700), service.answer_then_fail(1, EXHAUSTED, -1)]
    )
    client = connect()
    with pytest.raises(errors.ResourceExhaustedError):
        list(client.embed_stream(sentences(6)))
    assert client.delays_s == [0.7]


def test_an_error_that_retrying_cannot_help_ends_the_stream(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.append(service.answer_then_fail(1, grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(errors.InvalidRequestError):
        list(connect().embed_stream(sentences(6)))
    assert len(service.streams) == 1


@pytest.mark.parametrize("max_attempts", [1, 5])
def test_a_refused_stream_tells_why(connect: Connect, scripted: Scripted, max_attempts: int) -> None:
    def refuse(_requests: Iterator[pb.EmbedStreamRequest], context: Any) -> Iterator[pb.EmbedStreamResponse]:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "as scripted")
        yield from ()

    scripted.service.stream_acts.extend([refuse] * 100)
    client = connect(retry=RetryPolicy(max_attempts=max_attempts))
    for _ in range(20):
        with pytest.raises(errors.AuthenticationError):
            list(client.embed_stream(sentences(60)))


def test_an_early_end_in_good_order_is_a_break_too(connect: Connect, scripted: Scripted) -> None:
    def answer_two(requests: Iterator[pb.EmbedStreamRequest], _context: Any) -> Iterator[pb.EmbedStreamResponse]:
        stream = FakeStream(scripted.service.fake, next(requests).start)
        yield from (stream.answer(request.item) for request in itertools.islice(requests, 2))

    scripted.service.stream_acts.append(answer_two)
    check_same(list(connect().embed_stream(sentences(6))), expected(6))


def test_another_version_after_a_break(connect: Connect, scripted: Scripted) -> None:
    service = scripted.service
    service.stream_acts.extend(
        [service.answer_then_fail(1), service.answer_then_fail(0, grpc.StatusCode.FAILED_PRECONDITION)]
    )
    with pytest.raises(errors.ModelVersionChangedError):
        list(connect().embed_stream(sentences(6)))


def test_a_failed_sentence_raises_in_its_turn_or_returns(connect: Connect, scripted: Scripted) -> None:
    scripted.service.fake.failures["t2 x"] = "TOKEN_EMPTY"
    client = connect()
    results = client.embed_stream(sentences(5))
    assert [next(results).tokens[0], next(results).tokens[0]] == ["t0", "t1"]
    with pytest.raises(SentenceError, match="sentence 2: TOKEN_EMPTY"):
        next(results)
    found = list(client.embed_stream(sentences(5), on_error="return"))
    assert [isinstance(one, SentenceError) for one in found] == [False, False, True, False, False]


def test_an_error_of_the_input_reaches_the_caller(connect: Connect) -> None:
    class ReadError(Exception):
        pass

    def source() -> Iterator[list[str]]:
        yield ["a"]
        raise ReadError

    with pytest.raises(ReadError):
        list(connect().embed_stream(source()))
    with pytest.raises(TypeError, match="sentence 1 must be a str or a list of str, got int"):
        list(connect().embed_stream([["a"], 3]))


def test_no_result_in_time(connect: Connect, scripted: Scripted) -> None:
    released = threading.Event()

    def silent(requests: Iterator[pb.EmbedStreamRequest], _context: Any) -> Iterator[pb.EmbedStreamResponse]:
        released.wait(60)
        yield from ()

    scripted.service.stream_acts.append(silent)
    with pytest.raises(errors.DeadlineError, match="no result for"):
        list(connect().embed_stream(sentences(3), timeout_s=0.2))
    released.set()


def test_a_break_does_not_start_the_wait_anew(connect: Connect, scripted: Scripted) -> None:
    released = threading.Event()

    def late_break(_requests: Iterator[pb.EmbedStreamRequest], context: Any) -> Iterator[pb.EmbedStreamResponse]:
        released.wait(0.3)
        context.abort(UNAVAILABLE, "as scripted")
        yield from ()

    scripted.service.stream_acts.extend([late_break] * 10)
    # The break itself, where so little is left that another attempt would come too late
    with pytest.raises((errors.DeadlineError, errors.UnavailableError), match=r"no result for 0\.5 s|as scripted"):
        list(connect().embed_stream(sentences(3), timeout_s=0.5))
    assert len(scripted.service.streams) <= 2  # a third one would begin 0.6 s after the first
    released.set()


def test_no_wait_for_an_attempt_that_would_come_too_late(connect: Connect, scripted: Scripted) -> None:
    scripted.service.stream_acts.append(scripted.service.answer_then_fail(0, EXHAUSTED, pushback_ms=60_000))
    client = connect()
    with pytest.raises(errors.ResourceExhaustedError):
        list(client.embed_stream(sentences(3), timeout_s=30.0))
    assert client.delays_s == []


def test_leaving_the_iterator_cancels_the_call(connect: Connect, scripted: Scripted) -> None:
    ended = threading.Event()

    def endless(requests: Iterator[pb.EmbedStreamRequest], context: Any) -> Iterator[pb.EmbedStreamResponse]:
        context.add_callback(ended.set)
        stream = FakeStream(scripted.service.fake, next(requests).start)
        yield stream.answer(next(requests).item)
        ended.wait(60)  # the end of the requests alone must not be what ends the call

    scripted.service.stream_acts.append(endless)
    results = connect().embed_stream(["a" for _ in range(1000)])
    next(results)
    results.close()
    assert ended.wait(60)


def test_a_dropped_iterator_leaves_no_thread(scripted: Scripted, threads_before: set[threading.Thread]) -> None:
    with Client(scripted.target) as client:
        results = client.embed_stream(itertools.repeat("a"))
        next(results)
        assert any(thread.name == "bilm-stream-reader" for thread in threading.enumerate())
        del results
    ours = [t for t in set(threading.enumerate()) - threads_before if not t.name.startswith("scripted")]
    for thread in ours:
        thread.join(60)
    assert not [thread for thread in ours if thread.is_alive()]


def test_closing_the_client_ends_a_stream(scripted: Scripted) -> None:
    client = Client(scripted.target)
    results = client.embed_stream(itertools.repeat("a"), window=1)
    next(results)
    client.close()
    with pytest.raises(ClientClosedError):
        list(results)


def test_an_id_that_is_not_in_flight_is_malformed(connect: Connect, scripted: Scripted) -> None:
    def wrong(requests: Iterator[pb.EmbedStreamRequest], _context: Any) -> Iterator[pb.EmbedStreamResponse]:
        stream = FakeStream(scripted.service.fake, next(requests).start)
        response = stream.answer(next(requests).item)
        response.id = 77
        yield response

    scripted.service.stream_acts.append(wrong)
    with pytest.raises(errors.MalformedResponseError, match="77"):
        list(connect().embed_stream(sentences(2)))


def test_the_end_of_a_stream_right_behind_its_last_result_is_no_failure(connect: Connect, scripted: Scripted) -> None:
    for _ in range(20):  # whether the end is there already when the last result is taken is up to the threads
        client = connect(retry=RetryPolicy(max_attempts=1))
        check_same(list(client.embed_stream(sentences(5))), expected(5))
        assert client.delays_s == []
