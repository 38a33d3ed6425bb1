"""EmbedStream, through a real channel."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import h5py
import numpy as np
import pytest
from bilm_api.v1 import embed_pb2

from tests.integration.integration_support import PLAIN, options, tokens
from tests.integration.test_embed import array, embed, reason, refusal
from tests.support.servers import LoopServer

Request, Response = embed_pb2.EmbedStreamRequest, embed_pb2.EmbedStreamResponse


def start_message(**fields: Any) -> embed_pb2.EmbedStreamRequest:
    return Request(start=embed_pb2.StreamStart(**{"options": PLAIN, **fields}))


def item(item_id: int, sentence: embed_pb2.Sentence) -> embed_pb2.EmbedStreamRequest:
    return Request(item=embed_pb2.StreamItem(id=item_id, sentence=sentence))


def stream(server: LoopServer, *messages: embed_pb2.EmbedStreamRequest) -> list[embed_pb2.EmbedStreamResponse]:
    return list(server.stub().EmbedStream(iter(messages)))


def test_each_item_is_answered_as_embed_answers_it(server: LoopServer) -> None:
    sentences = [tokens(*["w"] * (i % 7), "end") for i in range(200)]
    responses = stream(server, start_message(), *(item(1000 + i, s) for i, s in enumerate(sentences)))
    assert sorted(response.id for response in responses) == [1000 + i for i in range(200)]
    whole = embed(server, *sentences).results
    for response in responses:
        assert response.rows.last
        expected = whole[response.id - 1000].embedding
        assert list(response.rows.embedding.tokens) == list(expected.tokens)
        assert np.abs(array(response.rows.embedding) - array(expected)).max() < 1e-5
        assert response.usage.tokens == len(expected.tokens)


@pytest.mark.parametrize("unset", [None, embed_pb2.EmbedOptions(), embed_pb2.EmbedOptions(layers=embed_pb2.LAYERS_ALL)])
def test_what_is_not_set_means_all_layers_no_pooling_float32(
    server: LoopServer, unset: embed_pb2.EmbedOptions | None
) -> None:
    (bare,) = stream(server, start_message(options=unset), item(1, tokens("a", "word")))
    (whole,) = stream(server, start_message(), item(1, tokens("a", "word")))
    assert bare.rows == whole.rows


def test_a_result_larger_than_a_message_comes_in_rows(start: Callable[..., LoopServer]) -> None:
    server = start("--model", "random:small")  # 3 KiB a token
    words = [f"w{i % 50}" for i in range(900)]
    parts = stream(server, start_message(), item(7, embed_pb2.Sentence(text=" ".join(words), return_state=True)))
    assert len(parts) == 3
    assert [part.rows.first_row for part in parts] == [0, 341, 682]
    assert [part.rows.last for part in parts] == [False, False, True]
    assert {part.rows.total_rows for part in parts} == {900}
    assert [word for part in parts for word in part.rows.embedding.tokens] == words
    starts = [place for part in parts for place in part.rows.embedding.token_starts]
    assert starts == [sum(len(word) + 1 for word in words[:i]) for i in range(900)]
    assert [bool(part.rows.embedding.state) for part in parts] == [False, False, True]
    assert [part.HasField("usage") for part in parts] == [False, False, True]
    whole = np.concatenate([array(part.rows.embedding) for part in parts], axis=1)
    expected = array(embed(server, tokens(*words)).results[0].embedding)
    assert np.abs(whole - expected).max() < 1e-5


def test_ten_thousand_tokens(server: LoopServer) -> None:
    parts = stream(server, start_message(), item(1, tokens(*["word"] * 10_000)))
    whole = np.concatenate([array(part.rows.embedding) for part in parts], axis=1)
    assert whole.shape == (3, 10_000, 16)
    # Embed gives the same where its answer fits, as here
    assert np.abs(whole - array(embed(server, tokens(*["word"] * 10_000)).results[0].embedding)).max() < 1e-5


def test_pooled_and_empty_results_are_one_message(server: LoopServer) -> None:
    (pooled,) = stream(server, start_message(options=options(pooling=embed_pb2.POOLING_MAX)), item(1, tokens("a", "b")))
    assert (pooled.rows.first_row, pooled.rows.total_rows, pooled.rows.last) == (0, 1, True)
    assert list(pooled.rows.embedding.tokens) == ["a", "b"]
    (empty,) = stream(server, start_message(), item(1, tokens()))
    assert (empty.rows.total_rows, empty.rows.last, list(empty.rows.embedding.tensor.shape)) == (0, True, [3, 0, 16])


def test_a_bad_item_costs_the_others_nothing(server: LoopServer) -> None:
    bad = [tokens("a", ""), embed_pb2.Sentence(), tokens("a", state=b"x"), tokens(*["x"] * 40_000)]
    messages = [item(i, sentence) for i, sentence in enumerate([*bad, tokens("good")])]
    found = {response.id: response for response in stream(server, start_message(), *messages, Request(item={"id": 9}))}
    expected = ["TOKEN_EMPTY", "SENTENCE_MISSING", "STATE_INVALID", "SENTENCE_TOO_LONG"]
    assert [reason(found[i].error) for i in range(4)] == expected
    assert reason(found[9].error) == "SENTENCE_MISSING"
    assert found[4].HasField("rows")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "STREAM_ORDER"),
        ([item(1, tokens("a"))], "STREAM_ORDER"),
        ([Request()], "STREAM_ORDER"),
        ([start_message(), start_message()], "STREAM_ORDER"),
        ([start_message(), Request()], "STREAM_ORDER"),
        ([start_message(options=options(layers=55))], "LAYERS_INVALID"),
        ([start_message(), item(1, tokens(*["a"] * 30000)), item(1, tokens("b"))], "ID_IN_USE"),
    ],
)
def test_a_bad_stream_is_refused(
    server: LoopServer, messages: list[embed_pb2.EmbedStreamRequest], expected: str
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stream(server, *messages)
    assert refusal(error.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, expected)


def test_an_id_may_be_used_again_once_its_result_has_come(server: LoopServer) -> None:
    arrived = threading.Event()

    def messages() -> Iterator[embed_pb2.EmbedStreamRequest]:
        yield start_message()
        yield item(1, tokens("a"))
        assert arrived.wait(60)
        yield item(1, tokens("b"))

    found = []
    for response in server.stub().EmbedStream(messages()):
        found.append(list(response.rows.embedding.tokens))
        arrived.set()
    assert found == [["a"], ["b"]]


def test_carry_state_reads_a_document_as_one_text(golden_server: LoopServer, golden: Path) -> None:
    sentences = json.loads((golden / "sentences.json").read_text(encoding="utf-8"))
    with h5py.File(golden / "expected.hdf5") as file:
        batches = json.loads(file["stateful"].attrs["batches"])
        for row in range(len(batches[0])):
            messages = [item(b, tokens(*sentences[batch[row]])) for b, batch in enumerate(batches)]
            responses = stream(golden_server, start_message(carry_state=True, return_state_every=2), *messages)
            assert [response.id for response in responses] == list(range(len(batches)))
            for b, response in enumerate(responses):
                expected = file[f"stateful/{b}/{row}"][()]
                assert np.abs(array(response.rows.embedding) - expected).max(initial=0.0) < 1e-5
                assert bool(response.rows.embedding.state) == (b % 2 == 1)


def test_a_carried_state_survives_the_connection(server: LoopServer) -> None:
    sentences = [tokens("first", "one"), tokens("second"), tokens("the", "third")]
    whole = stream(server, start_message(carry_state=True), *(item(i, s) for i, s in enumerate(sentences)))
    first = stream(server, start_message(carry_state=True, return_state_every=1), item(0, sentences[0]))
    resumed = embed_pb2.Sentence(state=first[0].rows.embedding.state)
    resumed.MergeFrom(sentences[1])
    rest = stream(server, start_message(carry_state=True), item(1, resumed), item(2, sentences[2]))
    for before, after in zip(whole, [*first, *rest], strict=True):
        assert np.array_equal(array(before.rows.embedding), array(after.rows.embedding))


def test_a_failed_sentence_leaves_the_carried_state_as_it_was(server: LoopServer) -> None:
    with_failure = stream(
        server, start_message(carry_state=True), item(0, tokens("a")), item(1, tokens("")), item(2, tokens("b"))
    )
    without = stream(server, start_message(carry_state=True), item(0, tokens("a")), item(2, tokens("b")))
    assert np.array_equal(array(with_failure[2].rows.embedding), array(without[1].rows.embedding))
    alone = stream(server, start_message(), item(2, tokens("b")))
    assert not np.array_equal(array(without[1].rows.embedding), array(alone[0].rows.embedding))


def test_the_server_reads_no_further_than_it_answers(start: Callable[..., LoopServer]) -> None:
    """A caller that takes no results can't make the server pile them up."""
    server = start("--max-stream-items-in-flight", "4")
    n_items, n_tokens = 30, 1000
    admission = server.stream_admission
    most = 0
    sentence = tokens(*["w"] * n_tokens)
    call = server.stub().EmbedStream(iter([start_message(), *(item(i, sentence) for i in range(n_items))]))
    ids = set()
    for response in call:
        ids.add(response.id)
        most = max(most, admission.used.tokens)
    assert ids == set(range(n_items))
    assert n_tokens <= most <= 4 * n_tokens
    assert admission.used.tokens == 0


def test_a_caller_that_leaves_is_no_error(server: LoopServer, caplog: pytest.LogCaptureFixture) -> None:
    sentence = tokens(*["w"] * 50)
    admission = server.stream_admission
    for _ in range(20):
        call = server.stub().EmbedStream(iter([start_message(), *(item(i, sentence) for i in range(30))]))
        next(call)
        call.cancel()
    deadline = time.monotonic() + 60
    while admission.used.tokens:
        assert time.monotonic() < deadline, "the server still works for callers that have left"
        time.sleep(0.002)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
