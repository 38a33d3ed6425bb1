"""Results as messages; the expected ones are written out field by field."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import DataType, OutputSpec, TokenChoice
from bilm_model.scalar_mix import Selection
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Call, Result, Sentence
from bilm_server.protocols.embed_v1.responses import STREAM_MESSAGE_BYTES, WireFormat
from bilm_server.protocols.grpc.status import status_of
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from tests.support.fake_engine import CONFIG, FakeEngine, fake_model

ALL, POOLED = OutputSpec(Selection()), OutputSpec(Selection("top", "mean"), "float16")
MODEL = fake_model()
WIRE = WireFormat(MODEL, omit_tokens=False)
DATA_TYPES: dict[DataType, embed_pb2.DataType] = {
    "float32": embed_pb2.DATA_TYPE_FLOAT32,
    "float16": embed_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": embed_pb2.DATA_TYPE_BFLOAT16,
}


def sentence(*tokens: str, output: OutputSpec = ALL, return_state: bool = False) -> Sentence:
    ends = tuple(range(1, len(tokens) + 1))
    return Sentence(
        Call(), None, output, tokens=tokens, starts=tuple(end - 1 for end in ends), ends=ends, return_state=return_state
    )


def result(vectors: NDArray[np.generic], state: int | None = None) -> Result:
    return Result(vectors, state, queue_s=0.25, inference_s=1.5)


def numbers(n_tokens: int) -> NDArray[np.float32]:
    shape = (CONFIG.layer_count, n_tokens, CONFIG.width)
    return np.arange(np.prod(shape), dtype="<f4").reshape(shape)


def usage(tokens: int, queue_ms: int = 250, inference_ms: int = 1500) -> embed_pb2.Usage:
    return embed_pb2.Usage(
        queue_time=Duration(seconds=0, nanos=queue_ms * 1_000_000),
        inference_time=Duration(seconds=inference_ms // 1000, nanos=inference_ms % 1000 * 1_000_000),
        tokens=tokens,
        model_version=MODEL.version,
    )


def built(
    wire: WireFormat, sentences: Sequence[Sentence], results: Sequence[Result | RefusalError]
) -> embed_pb2.EmbedResponse:
    return embed_pb2.EmbedResponse.FromString(wire.build(sentences, results))


def test_a_response_holds_every_sentence_in_its_place() -> None:
    refusal = RefusalError(Reason.TOKEN_EMPTY, "token 0 is empty")
    first, last = sentence("a", "bc"), sentence("d", return_state=True)
    found = built(WIRE, [first, sentence(""), last], [result(numbers(2)), refusal, result(numbers(1), 7)])
    assert found == embed_pb2.EmbedResponse(
        results=[
            embed_pb2.EmbedResult(
                embedding=embed_pb2.Embedding(
                    tokens=["a", "bc"],
                    token_starts=[0, 1],
                    token_ends=[1, 2],
                    tensor=embed_pb2.Tensor(
                        data=numbers(2).tobytes(), shape=[3, 2, 4], data_type=embed_pb2.DATA_TYPE_FLOAT32
                    ),
                )
            ),
            embed_pb2.EmbedResult(error=status_of(refusal)),
            embed_pb2.EmbedResult(
                embedding=embed_pb2.Embedding(
                    tokens=["d"],
                    token_starts=[0],
                    token_ends=[1],
                    tensor=embed_pb2.Tensor(
                        data=numbers(1).tobytes(), shape=[3, 1, 4], data_type=embed_pb2.DATA_TYPE_FLOAT32
                    ),
                    state=(7).to_bytes(8, "little"),
                )
            ),
        ],
        usage=usage(3),
    )


def test_a_response_without_any_result_says_that_it_cost_nothing() -> None:
    found = built(WIRE, [sentence("")], [RefusalError(Reason.TOKEN_EMPTY, "token 0 is empty")])
    assert found.usage == usage(0, 0, 0)
    assert found.usage.HasField("queue_time")


def test_tokens_can_be_omitted_and_their_offsets_stay() -> None:
    found = built(WireFormat(MODEL, omit_tokens=True), [sentence("a", "b")], [result(numbers(2))])
    embedding = found.results[0].embedding
    assert not embedding.tokens
    assert list(embedding.token_starts) == [0, 1]


@pytest.mark.parametrize(
    ("data_type", "on_the_wire", "dtype"),
    [
        ("float32", embed_pb2.DATA_TYPE_FLOAT32, "<f4"),
        ("float16", embed_pb2.DATA_TYPE_FLOAT16, "<f2"),
        ("bfloat16", embed_pb2.DATA_TYPE_BFLOAT16, "<i2"),
    ],
)
def test_numbers_keep_their_bytes(data_type: DataType, on_the_wire: embed_pb2.DataType, dtype: str) -> None:
    vectors = np.arange(12, dtype=dtype).reshape(3, 1, 4)
    found = built(WIRE, [sentence("a", output=OutputSpec(Selection(), data_type))], [result(vectors)])
    tensor = found.results[0].embedding.tensor
    assert (tensor.data, tensor.data_type) == (vectors.tobytes(), on_the_wire)


def test_no_response_is_larger_than_its_bound() -> None:
    for tokens in ((), ("",), ("ä" * 300,), ("a",) * 500, ("🙂",) * 300):
        asked, found = sentence(*tokens, return_state=True), result(numbers(len(tokens)), 2**60)
        bound = WIRE.overhead_bytes(asked) + numbers(len(tokens)).nbytes + 8
        message = built(WIRE, [asked], [found])
        assert message.results[0].ByteSize() + 10 <= bound


# ---- streams ----


def rows(asked: Sentence, found: Result, **how: bool) -> list[embed_pb2.EmbedStreamResponse]:
    return list(WIRE.rows(9, asked, found, with_state=how.get("with_state", False)))


def test_a_small_result_is_one_message() -> None:
    asked = sentence("a", "b", return_state=True)
    (message,) = rows(asked, result(numbers(2), 5), with_state=True)
    whole = built(WIRE, [asked], [result(numbers(2), 5)])
    assert message == embed_pb2.EmbedStreamResponse(
        id=9,
        rows=embed_pb2.EmbeddingRows(embedding=whole.results[0].embedding, first_row=0, total_rows=2, last=True),
        usage=usage(2),
    )


def test_a_state_that_only_the_next_sentence_needs_is_not_sent() -> None:
    (message,) = rows(sentence("a", return_state=True), result(numbers(1), 5))
    assert not message.rows.embedding.state


def test_a_large_result_comes_in_ranges_of_rows() -> None:
    row_bytes = 3 * 4 * 4
    n_tokens = 2 * (STREAM_MESSAGE_BYTES // row_bytes) + 1
    asked, vectors = sentence(*["a"] * n_tokens), numbers(n_tokens)
    messages = rows(asked, result(vectors, 5), with_state=True)
    step = STREAM_MESSAGE_BYTES // row_bytes
    assert [message.rows.first_row for message in messages] == [0, step, 2 * step]
    assert {message.rows.total_rows for message in messages} == {n_tokens}
    assert [message.rows.last for message in messages] == [False, False, True]
    assert [message.HasField("usage") for message in messages] == [False, False, True]
    assert [bool(message.rows.embedding.state) for message in messages] == [False, False, True]
    parts = [
        np.frombuffer(message.rows.embedding.tensor.data, "<f4").reshape(message.rows.embedding.tensor.shape)
        for message in messages
    ]
    assert np.array_equal(np.concatenate(parts, axis=1), vectors)
    assert sum(len(message.rows.embedding.tokens) for message in messages) == n_tokens


def test_a_pooled_result_is_one_row_with_all_its_tokens() -> None:
    asked = sentence(*["a"] * 100_000, output=POOLED)
    (message,) = rows(asked, result(np.ones(4, "<f2")))
    assert (message.rows.first_row, message.rows.total_rows, message.rows.last) == (0, 1, True)
    assert list(message.rows.embedding.tensor.shape) == [4]
    assert len(message.rows.embedding.tokens) == 100_000


def test_a_sentence_without_tokens_has_no_rows_and_an_end() -> None:
    (message,) = rows(sentence(), result(numbers(0)))
    assert (message.rows.first_row, message.rows.total_rows, message.rows.last) == (0, 0, True)
    assert list(message.rows.embedding.tensor.shape) == [3, 0, 4]


def test_a_model_without_states_sends_none() -> None:
    wire = WireFormat(fake_model(FakeEngine(codec=None)), omit_tokens=False)
    (message,) = wire.rows(1, sentence("a"), result(numbers(1)), with_state=True)
    assert not message.rows.embedding.state


@pytest.mark.parametrize("data_type", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layers", ["top", "all"])
def test_vectors_alone_are_on_the_wire_as_protobuf_writes_them(
    data_type: DataType, layers: Literal["top", "all"]
) -> None:
    """Lengths of one, two and three bytes; values that look like a part of a length; a view that isn't contiguous."""
    wire, output = WireFormat(MODEL, omit_tokens=True), OutputSpec(Selection(layers, "mean"), data_type)
    for width in (1, 2, 63, 64, 5_000):
        shape = (width,) if layers == "top" else (3, width)
        for vectors in (np.full(shape, -1, np.int16), np.ones((*shape, 2), np.int16)[..., 0]):
            asked = Sentence(Call(), None, output, tokens=("a", "b"))
            expected = embed_pb2.EmbedResponse(usage=usage(2))
            tensor = expected.results.add().embedding.tensor
            tensor.data, tensor.data_type = vectors.tobytes(), DATA_TYPES[data_type]
            tensor.shape.extend(shape)
            assert wire.build([asked], [result(vectors)]) == expected.SerializeToString(deterministic=True)


def test_a_vector_alone_keeps_its_place_beside_others() -> None:
    wire = WireFormat(MODEL, omit_tokens=True)
    refusal, vector = RefusalError(Reason.TOKEN_EMPTY, "token 0 is empty"), np.arange(4, dtype="<f2")
    alone = Sentence(Call(), None, POOLED, tokens=("a",))
    cut = Sentence(Call(), None, POOLED, tokens=("b",), truncated=True)
    carried = Sentence(Call(), None, POOLED, tokens=("c",), return_state=True)
    text = sentence("d", output=POOLED)
    asked = [alone, cut, alone, carried, alone, text]
    found = built(
        wire, asked, [result(vector), result(vector), refusal, result(vector, 7), result(vector * 2), result(vector)]
    )
    assert [each.WhichOneof("outcome") for each in found.results] == [
        "embedding", "embedding", "error", "embedding", "embedding", "embedding",
    ]  # fmt: skip
    embeddings = [each.embedding for each in found.results]
    assert [each.truncated for each in embeddings] == [False, True, False, False, False, False]
    assert [each.state for each in embeddings] == [b"", b"", b"", (7).to_bytes(8, "little"), b"", b""]
    assert [list(each.token_ends) for each in embeddings] == [[], [], [], [], [], [1]]
    assert [each.tensor.data for each in embeddings] == [
        vector.tobytes(), vector.tobytes(), b"", vector.tobytes(), (vector * 2).tobytes(), vector.tobytes(),
    ]  # fmt: skip
    assert found.usage == usage(5)


# ---- chosen rows and spans ----


def choosing(asked: Sentence, rows: Sequence[int], lengths: Sequence[int] | None = None) -> Sentence:
    asked.choice = TokenChoice(np.array(rows), None if lengths is None else np.array(lengths))
    return asked


def test_chosen_rows_bring_their_tokens_and_no_other() -> None:
    asked = choosing(sentence("a", "bc", "d"), (2, 0, 2))
    embedding = built(WIRE, [asked], [result(numbers(3))]).results[0].embedding
    assert list(embedding.tokens) == ["d", "a", "d"]
    assert (list(embedding.token_starts), list(embedding.token_ends)) == ([2, 0, 2], [3, 1, 3])
    assert list(embedding.tensor.shape) == [3, 3, 4]


@pytest.mark.parametrize("lengths", [None, (1, 2)])
def test_rows_that_are_pooled_bring_all_tokens_of_the_sentence(lengths: tuple[int, ...] | None) -> None:
    asked = choosing(sentence("a", "bc", "d", output=POOLED), (2, 0, 2), lengths)
    shape = (4,) if lengths is None else (2, 4)
    embedding = built(WIRE, [asked], [result(np.ones(shape, "<f2"))]).results[0].embedding
    assert list(embedding.tokens) == ["a", "bc", "d"]
    assert list(embedding.token_starts) == [0, 1, 2]
    assert list(embedding.tensor.shape) == list(shape)


def test_vectors_of_spans_stay_whole_where_tokens_are_omitted() -> None:
    vectors = np.arange(8, dtype="<f2").reshape(2, 4)
    asked = choosing(Sentence(Call(), None, POOLED, tokens=("a", "b")), (0, 1), (1, 1))
    tensor = built(WireFormat(MODEL, omit_tokens=True), [asked], [result(vectors)]).results[0].embedding.tensor
    assert (tensor.data, list(tensor.shape)) == (vectors.tobytes(), [2, 4])


def test_no_response_to_chosen_rows_is_larger_than_its_bound() -> None:
    for rows in ([0], [0] * 500, [1] * 300, list(range(100)) * 3):
        asked = choosing(sentence(*["ä" * 300, "🙂", *["a"] * 98], return_state=True), rows)
        bound = WIRE.overhead_bytes(asked) + numbers(len(rows)).nbytes + 8
        message = built(WIRE, [asked], [result(numbers(len(rows)), 2**60)])
        assert message.results[0].ByteSize() + 10 <= bound


def test_many_chosen_rows_come_in_ranges() -> None:
    step = STREAM_MESSAGE_BYTES // (3 * 4 * 4)
    indices = [i % 3 for i in range(2 * step + 1)]
    messages = rows(choosing(sentence("a", "b", "c"), indices), result(numbers(len(indices))))
    assert [message.rows.first_row for message in messages] == [0, step, 2 * step]
    assert {message.rows.total_rows for message in messages} == {len(indices)}
    assert [token for message in messages for token in message.rows.embedding.tokens] == ["abc"[i] for i in indices]
    data = b"".join(message.rows.embedding.tensor.data for message in messages[-1:])
    assert data == numbers(len(indices))[:, 2 * step :].tobytes()


def test_many_spans_come_in_ranges_and_the_tokens_with_the_first() -> None:
    output = OutputSpec(Selection("all", "max"))
    step = STREAM_MESSAGE_BYTES // (3 * 4 * 4)
    asked = choosing(sentence("a", "b", output=output), [0] * (step + 1), [1] * (step + 1))
    first, last = rows(asked, result(numbers(step + 1)))
    assert (first.rows.first_row, last.rows.first_row) == (0, step)
    assert {first.rows.total_rows, last.rows.total_rows} == {step + 1}
    assert list(first.rows.embedding.tokens) == ["a", "b"]
    assert list(first.rows.embedding.token_ends) == [1, 2]
    assert not last.rows.embedding.tokens
    assert not last.rows.embedding.token_ends
    assert list(last.rows.embedding.tensor.shape) == [3, 1, 4]


def test_rows_that_are_pooled_are_one_row() -> None:
    asked = choosing(sentence("a", "b", output=POOLED), [0, 1])
    (message,) = rows(asked, result(np.ones(4, "<f2")))
    assert (message.rows.first_row, message.rows.total_rows, message.rows.last) == (0, 1, True)
