"""Chosen rows and spans through a real channel: the bits of the whole answer, and the refusal of one sentence only."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2
from bilm_client import Chosen, Client, ScalarMix
from bilm_client._core.settings import Deadline, Settings
from bilm_client._transport.grpc_sync import GrpcSyncTransport
from bilm_client.client import TransportClient
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.integration.integration_support import tokens
from tests.integration.test_embed import embed, reason
from tests.integration.test_stream import item, start_message, stream
from tests.support.servers import LoopServer

Bits = NDArray[Any]

LAYERS = (
    {"layers": embed_pb2.LAYERS_ALL},
    {"layers": embed_pb2.LAYERS_TOP},
    {"layers": embed_pb2.LAYERS_AVERAGE},
    {"layers": embed_pb2.LAYERS_MIX, "mix": embed_pb2.ScalarMix(weights=[0.3, -1, 0.5], gamma=1.5)},
    {"layers": embed_pb2.LAYERS_MIX, "mix": embed_pb2.ScalarMix(weights=[0.3, -1, 0.5], layer_norm=True)},
)
POOLINGS = {embed_pb2.POOLING_MEAN: np.add, embed_pb2.POOLING_MAX: np.maximum}
DTYPES = {
    embed_pb2.DATA_TYPE_FLOAT32: "<f4", embed_pb2.DATA_TYPE_FLOAT16: "<f2", embed_pb2.DATA_TYPE_BFLOAT16: "<u2",
}  # fmt: skip
TEXT = "Naïve “quotes”, don't they?"
"""Naïve “ quotes ” , don 't they ?"""


def bits(result: embed_pb2.EmbedResult) -> Bits:
    assert result.HasField("embedding"), result.error.message
    tensor = result.embedding.tensor
    return np.frombuffer(tensor.data, DTYPES[tensor.data_type]).reshape(tuple(tensor.shape))


def rows(*indices: int) -> embed_pb2.Rows:
    return embed_pb2.Rows(rows=indices)


def spans(*ranges: tuple[int, int], unit: int = embed_pb2.SPAN_UNIT_TOKENS) -> embed_pb2.Spans:
    return embed_pb2.Spans(unit=unit, spans=[embed_pb2.Span(start=start, end=end) for start, end in ranges])  # type: ignore[arg-type]


def rounded(numbers: NDArray[np.float32], data_type: embed_pb2.DataType) -> Bits:
    if data_type != embed_pb2.DATA_TYPE_BFLOAT16:
        return numbers.astype(DTYPES[data_type])
    as_int = numbers.view(np.uint32)
    return ((as_int + 0x7FFF + (as_int >> 16 & 1)) >> 16).astype("<u2")


words = st.lists(st.sampled_from(["a", "bank", "x" * 60, "日本"]), min_size=1, max_size=12)


@st.composite
def row_questions(draw: st.DrawFn) -> list[tuple[list[str], list[int]]]:
    asked = draw(st.lists(words, min_size=1, max_size=4))
    return [(each, draw(st.lists(st.integers(0, len(each) - 1), min_size=1, max_size=15))) for each in asked]


options_drawn = st.fixed_dictionaries({"data_type": st.sampled_from(list(DTYPES)), "l2_normalize": st.booleans()})


@settings(deadline=None, max_examples=60)
@given(asked=row_questions(), layers=st.sampled_from(LAYERS), options=options_drawn)
def test_rows_have_the_bits_of_the_whole_answer(
    server: LoopServer, asked: list[tuple[list[str], list[int]]], layers: dict[str, Any], options: dict[str, Any]
) -> None:
    whole = embed(server, *(tokens(*sentence) for sentence, _ in asked), **layers, **options)
    found = embed(server, *(tokens(*sentence, rows=rows(*its)) for sentence, its in asked), **layers, **options)
    assert found.usage.tokens == whole.usage.tokens
    for (sentence, its), one, all_of_it in zip(asked, found.results, whole.results, strict=True):
        assert np.array_equal(bits(one), bits(all_of_it)[..., its, :])
        assert list(one.embedding.tokens) == [sentence[row] for row in its]


@settings(deadline=None, max_examples=60)
@given(
    asked=row_questions(), layers=st.sampled_from(LAYERS), pooling=st.sampled_from(list(POOLINGS)),
    data_type=st.sampled_from(list(DTYPES)),
)  # fmt: skip
def test_rows_are_pooled_in_their_order(
    server: LoopServer,
    asked: list[tuple[list[str], list[int]]],
    layers: dict[str, Any],
    pooling: embed_pb2.Pooling,
    data_type: embed_pb2.DataType,
) -> None:
    whole = embed(server, *(tokens(*sentence) for sentence, _ in asked), **layers)
    sentences = [tokens(*sentence, rows=rows(*its)) for sentence, its in asked]
    found = embed(server, *sentences, **layers, pooling=pooling, data_type=data_type)
    unit = embed(server, *sentences, **layers, pooling=pooling, l2_normalize=True)
    for (sentence, its), one, of_length_1, all_of_it in zip(
        asked, found.results, unit.results, whole.results, strict=True
    ):
        pooled = functools.reduce(POOLINGS[pooling], [bits(all_of_it)[..., row, :] for row in its])
        if pooling == embed_pb2.POOLING_MEAN:
            pooled = pooled / np.float32(len(its))
        assert np.array_equal(bits(one), rounded(pooled, data_type))
        assert np.allclose(bits(of_length_1), pooled / np.linalg.norm(pooled, axis=-1, keepdims=True), atol=1e-6)
        assert list(one.embedding.tokens) == sentence


@st.composite
def span_questions(draw: st.DrawFn) -> list[tuple[list[str], list[tuple[int, int]]]]:
    def ranges(length: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.integers(0, length - 1).flatmap(
            lambda start: st.integers(start + 1, length).map(lambda end: (start, end))
        )

    asked = draw(st.lists(words, min_size=1, max_size=4))
    return [(each, draw(st.lists(ranges(len(each)), min_size=1, max_size=8))) for each in asked]


@settings(deadline=None, max_examples=60)
@given(
    asked=span_questions(), layers=st.sampled_from(LAYERS), pooling=st.sampled_from(list(POOLINGS)),
    options=options_drawn,
)  # fmt: skip
def test_each_span_has_the_bits_of_its_rows_pooled(
    server: LoopServer,
    asked: list[tuple[list[str], list[tuple[int, int]]]],
    layers: dict[str, Any],
    pooling: int,
    options: dict[str, Any],
) -> None:
    options = {**layers, **options, "pooling": pooling}
    found = embed(server, *(tokens(*sentence, spans=spans(*its)) for sentence, its in asked), **options)
    for (sentence, its), one in zip(asked, found.results, strict=True):
        alone = embed(server, *(tokens(*sentence, rows=rows(*range(*each))) for each in its), **options)
        expected = np.stack([bits(each) for each in alone.results], axis=-2)
        assert np.array_equal(bits(one), expected)
        assert list(one.embedding.tokens) == sentence


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [(0, 6, 0, 0), (2, 3, 0, 0), (7, 10, 1, 1), (8, 11, 1, 2), (20, 28, 5, 7), (0, 32, 0, 8), (31, 32, 8, 8)],
)
def test_bytes_of_a_text_are_the_tokens_that_have_them(
    server: LoopServer, start: int, end: int, first: int, last: int
) -> None:
    asked = embed_pb2.Sentence(text=TEXT, spans=spans((start, end), unit=embed_pb2.SPAN_UNIT_BYTES))
    by_rows = embed_pb2.Sentence(text=TEXT, rows=rows(*range(first, last + 1)))
    found = embed(server, asked, by_rows, pooling=embed_pb2.POOLING_MEAN).results
    assert np.array_equal(bits(found[0])[:, 0], bits(found[1]))
    assert list(found[0].embedding.token_ends) == [6, 10, 16, 19, 20, 24, 26, 31, 32]


def test_offsets_come_with_their_rows(server: LoopServer) -> None:
    embedding = embed(server, embed_pb2.Sentence(text=TEXT, rows=rows(7, 1))).results[0].embedding
    assert list(embedding.tokens) == ["they", "“"]
    assert (list(embedding.token_starts), list(embedding.token_ends)) == ([27, 7], [31, 10])


def test_the_state_is_that_of_the_whole_sentence(server: LoopServer) -> None:
    whole, chosen = embed(
        server, tokens("a", "b", "c", return_state=True), tokens("a", "b", "c", return_state=True, rows=rows(0))
    ).results
    assert chosen.embedding.state == whole.embedding.state != b""
    after_whole, after_chosen = embed(
        server,
        tokens("d", "e", state=whole.embedding.state),
        tokens("d", "e", state=chosen.embedding.state, rows=rows(1, 0)),
    ).results
    assert np.array_equal(bits(after_chosen), bits(after_whole)[:, [1, 0]])


def bad_sentences(*, pooled: bool) -> list[embed_pb2.Sentence]:
    found = [
        tokens("a", "b", rows=rows()),
        tokens("a", "b", rows=rows(0, 2)),
        tokens("a", "b", rows=rows(2**32 - 1)),
        tokens("a", "b", spans=spans()),
        tokens("a", "b", spans=spans((1, 1))),
        tokens("a", "b", spans=spans((1, 0))),
        tokens("a", "b", spans=spans((0, 3))),
        tokens("a", "b", spans=spans((0, 1), unit=embed_pb2.SPAN_UNIT_BYTES)),
        tokens("a", "b", spans=spans((0, 1), unit=9)),
        embed_pb2.Sentence(text="a  b", spans=spans((1, 3), unit=embed_pb2.SPAN_UNIT_BYTES)),
        embed_pb2.Sentence(text="a  b", spans=spans((0, 5), unit=embed_pb2.SPAN_UNIT_BYTES)),
    ]
    return found if pooled else [*found, tokens("a", "b", spans=spans((0, 1))), tokens(rows=rows(0))]


@pytest.mark.parametrize("pooling", [embed_pb2.POOLING_NONE, *POOLINGS])
def test_a_bad_selection_is_that_sentences_error_only(server: LoopServer, pooling: embed_pb2.Pooling) -> None:
    good = tokens("a", "b", rows=rows(1))
    bad = bad_sentences(pooled=pooling != embed_pb2.POOLING_NONE)
    (expected,) = embed(server, good, pooling=pooling).results
    sentences: Sequence[embed_pb2.Sentence] = [each for one in bad for each in (one, good)]
    results = embed(server, *sentences, pooling=pooling).results
    assert all(result == expected for result in results[1::2])
    assert {reason(result.error) for result in results[::2]} == {"SELECTION_INVALID"}
    items = stream(server, start_message(options=embed_pb2.EmbedOptions(pooling=pooling)), *map(item, range(99), bad))
    assert {reason(each.error) for each in items} == {"SELECTION_INVALID"}
    assert len(items) == len(bad)


def test_a_stream_answers_as_embed_does(server: LoopServer) -> None:
    options = embed_pb2.EmbedOptions(pooling=embed_pb2.POOLING_MAX)
    asked = [
        tokens(
            *["w"] * (i % 5), "end", **({"rows": rows(i % 5, 0)} if i % 2 else {"spans": spans((0, 1), (0, i % 5 + 1))})
        )
        for i in range(40)
    ]
    whole = embed(server, *asked, pooling=embed_pb2.POOLING_MAX).results
    responses = stream(server, start_message(options=options), *(item(i, each) for i, each in enumerate(asked)))
    for response in responses:
        assert response.rows.embedding == whole[response.id].embedding
        assert (response.rows.first_row, response.rows.last) == (0, True)
        assert response.rows.total_rows == (1 if response.id % 2 else 2)


def test_many_rows_come_in_ranges_on_a_stream(start: Callable[..., LoopServer]) -> None:
    server = start("--model", "random:small")  # 3 KiB a row
    indices = [i * 7 % 20 for i in range(800)]
    asked = tokens(*[f"w{i}" for i in range(20)], rows=rows(*indices))
    parts = stream(server, start_message(), item(1, asked))
    assert [part.rows.first_row for part in parts] == [0, 341, 682]
    assert {part.rows.total_rows for part in parts} == {800}
    assert [token for part in parts for token in part.rows.embedding.tokens] == [f"w{i}" for i in indices]
    tensors = [embed_pb2.EmbedResult(embedding=part.rows.embedding) for part in parts]
    whole = embed(server, tokens(*[f"w{i}" for i in range(20)])).results[0]
    assert np.array_equal(np.concatenate([bits(each) for each in tensors], axis=1), bits(whole)[:, indices])


def test_only_what_comes_back_counts_for_the_size_of_a_response(start: Callable[..., LoopServer]) -> None:
    server = start("--model", "random:small")
    sentence = [f"w{i}" for i in range(60)]
    with pytest.raises(Exception, match="RESPONSE_TOO_LARGE|the response would have about"):
        embed(server, *[tokens(*sentence)] * 100)
    found = embed(server, *[tokens(*sentence, rows=rows(59))] * 100)
    assert {tuple(result.embedding.tensor.shape) for result in found.results} == {(3, 1, 256)}
    with pytest.raises(Exception, match="the response would have about"):
        embed(server, *[tokens(*sentence, rows=rows(*[0] * 60 * 64))] * 2)


# ---- by the client ----


class EarlierTransport(GrpcSyncTransport):
    """Reaches a server as if it were one that can't choose."""

    def get_model(self, request: embed_pb2.GetModelRequest, deadline: Deadline) -> embed_pb2.GetModelResponse:
        found = super().get_model(request, deadline)
        found.ClearField("features")
        return found


CHOSEN: list[Any] = [
    Chosen(TEXT, rows=[8, 0, 8]),
    Chosen(TEXT, spans=[(0, 5), (14, 24)], span_unit="characters"),
    Chosen(["a", "b", "c"], spans=[(0, 3), (1, 2)]),
    ["plain", "sentence"],
]


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_the_client_chooses_with_the_servers_bits(server: LoopServer, pool: str) -> None:
    asked = Settings(target=server.target)
    mixes: list[dict[str, Any]] = [
        {"layers": "mix", "mix": ScalarMix([0.3, -1, 0.5], 1.5, each)} for each in (True, False)
    ]
    with Client(server.target) as client, TransportClient(asked, EarlierTransport) as earlier:
        for layers in ({"layers": "all"}, {"layers": "top"}, {"layers": "average"}, *mixes):
            for dtype in ("float32", "float16", "bfloat16"):
                options = {**layers, "dtype": dtype, "pool": pool}
                here, there = (each.embed(CHOSEN, **options) for each in (earlier, client))
                streamed = earlier.embed_stream(CHOSEN, **options)
                for one, two, three in zip(here, there, streamed, strict=True):
                    assert one.tokens == two.tokens == three.tokens
                    assert np.array_equal(one.vectors, two.vectors)
                    assert np.array_equal(three.vectors, two.vectors)
                unit = (each.embed(CHOSEN, **options, l2_normalize=True) for each in (earlier, client))
                for one, two in zip(*unit, strict=True):
                    assert np.allclose(one.vectors, two.vectors, rtol=1e-2, atol=1e-6)
        assert "selection" in client.model_info().features
        assert not earlier.model_info().features
