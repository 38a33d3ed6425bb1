"""Chosen rows and spans: asked of a server that can choose, and cut on this side for one that can't."""

import itertools
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import Chosen, Embedding, ScalarMix, SentenceError
from bilm_client._core.inputs import parse_sentences
from bilm_client._core.options import Options
from bilm_client._core.plan import cost_of
from bilm_client.errors import MalformedResponseError, UnsupportedError
from bilm_client.results import ModelInfo
from bilm_client.testing import FakeClient
from bilm_client.testing.models import FakeModel
from bilm_client.testing.service import FakeService

from tests.support.scripted import Scripted
from tests.unit.client.conftest import Connect, Either

TEXT = "Naïve words , of 日本"
"""Tokens at white space: bytes 0 to 6, 7 to 12, 13 to 14, 15 to 17, 18 to 24."""
WORDS = TEXT.split()
LAYERS: list[dict[str, Any]] = [
    {"layers": "all"},
    {"layers": "top"},
    {"layers": "average"},
    {"layers": "mix", "mix": ScalarMix((0.1, -1.0, 0.4), 1.2, layer_norm=True)},
]


@pytest.fixture(params=["can choose", "can't choose"])
def either(request: pytest.FixtureRequest, connect: Connect, scripted: Scripted) -> Either:
    """Return a client of a server of today, and of an earlier one."""
    if request.param == "can't choose":
        be_earlier(scripted)
    return connect()


def be_earlier(scripted: Scripted) -> None:
    scripted.service.serve(FakeModel(features=()))


def by_stream(client: Either, sentences: Iterable[Any], **options: Any) -> list[Any]:
    return list(client.embed_stream(sentences, **options))


def by_call(client: Either, sentences: Iterable[Any], **options: Any) -> list[Any]:
    found: list[Any] = client.embed(sentences, **options)
    return found


WAYS = pytest.mark.parametrize("embed", [by_call, by_stream])


def same(found: Embedding, expected: Embedding) -> bool:
    return (
        (found.tokens, found.offsets, found.truncated, found.state)
        == (expected.tokens, expected.offsets, expected.truncated, expected.state)
        and found.vectors.dtype == expected.vectors.dtype
        and np.array_equal(found.vectors, expected.vectors)
        and not found.vectors.flags.writeable
    )


# ---- what can be asked for ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of rows and spans must be given, got none"),
        ({"rows": [0], "spans": [(0, 1)]}, "one of rows and spans must be given, got both"),
        ({"rows": [-1]}, "rows must be from 0 to 4294967295, got -1"),
        ({"rows": [2**32]}, "rows must be from 0 "),
        ({"spans": [(0, -1)]}, "spans must be from 0 "),
        ({"rows": [0], "span_unit": "words"}, "span_unit must be one of 'tokens', 'characters', 'bytes', got 'words'"),
        ({"rows": [0], "span_unit": "bytes"}, "span_unit must be 'tokens' without spans of a text, got 'bytes'"),
    ],
)
def test_a_choice_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Chosen("a b", **arguments)


def test_bytes_and_characters_need_a_text() -> None:
    with pytest.raises(ValueError, match="span_unit must be 'tokens'"):
        Chosen(["a", "b"], spans=[(0, 1)], span_unit="characters")


@pytest.mark.parametrize(
    "arguments", [{"rows": [0.0]}, {"spans": [0, 1]}, {"spans": [(0, 1, 2)]}, {"spans": [(0, "1")]}]
)
def test_a_choice_of_a_wrong_type(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        Chosen("a b", **arguments)
    with pytest.raises(TypeError, match="got a Chosen"):
        Chosen(Chosen("a", rows=[0]), rows=[0])  # type: ignore[arg-type]


def test_a_choice_is_a_value() -> None:
    one = Chosen("a b", rows=np.array([1, 0]))
    assert one == Chosen("a b", rows=(1, 0)) != Chosen("a b", rows=(0, 1))
    assert pickle.loads(pickle.dumps(one)) == one


@WAYS
def test_spans_need_a_pooling(connect: Connect, embed: Any) -> None:
    with pytest.raises(ValueError, match=r"pool must be 'mean' or 'max' for the spans of sentence"):
        embed(connect(), ["a", Chosen("a b", spans=[(0, 1)])])


def test_a_lone_choice_is_one_sentence(connect: Connect) -> None:
    [found] = connect().embed(Chosen(TEXT, rows=[1]))
    assert found.tokens == ("words",)
    with pytest.raises(TypeError, match="iterable of sentences"):
        next(connect().embed_stream(Chosen(TEXT, rows=[1])))  # type: ignore[arg-type]


# ---- what is sent ----


def test_rows_and_spans_are_sent_as_they_are(connect: Connect, scripted: Scripted) -> None:
    connect().embed([Chosen(WORDS, rows=[2, 0]), Chosen(TEXT, rows=[]), "whole"], on_error="return")
    connect().embed(
        [Chosen(WORDS, spans=[(0, 2), (1, 3)]), Chosen(TEXT, spans=[(2, 9)], span_unit="bytes")], pool="max"
    )
    rows, spans = (request.sentences for request in scripted.service.embed_requests)
    assert [each.WhichOneof("selection") for each in (*rows, *spans)] == ["rows", "rows", None, "spans", "spans"]
    assert list(rows[0].rows.rows) == [2, 0]
    assert [(span.start, span.end) for span in spans[0].spans.spans] == [(0, 2), (1, 3)]
    assert [each.spans.unit for each in spans] == [pb.SPAN_UNIT_TOKENS, pb.SPAN_UNIT_BYTES]


@pytest.mark.parametrize(
    ("text", "characters", "as_bytes"),
    [
        ("Naïve “x”", [(0, 5), (6, 9), (8, 9)], [(0, 6), (7, 14), (11, 14)]),
        ("Naïve “x”", [(9, 9), (8, 10), (12, 20)], [(14, 14), (11, 15), (17, 25)]),
        ("plain", [(1, 3), (4, 9)], [(1, 3), (4, 9)]),
    ],
)
def test_characters_are_sent_as_bytes(
    text: str, characters: list[tuple[int, int]], as_bytes: list[tuple[int, int]]
) -> None:
    [source] = parse_sentences(Chosen(text, spans=characters, span_unit="characters"), None, False)
    assert source.choice is not None
    assert (list(source.choice.spans), source.choice.in_bytes) == (as_bytes, True)


def test_only_chosen_rows_count_in_a_response() -> None:
    info, options = ModelInfo.from_proto(FakeService().get_model()), Options(layers="top")
    row_bytes = 16 * 4

    def cost(sentence: Any, options: Options) -> int:
        [source] = parse_sentences([sentence], None, False)
        return cost_of(source, options, info).response_bytes

    whole = cost(["a"] * 100, options)
    assert whole - cost(Chosen(["a"] * 100, rows=[0, 1]), options) == 98 * row_bytes
    pooled = Options(layers="top", pool="mean")
    assert cost(Chosen(["a"] * 100, spans=[(0, 9)] * 5), pooled) - cost(["a"] * 100, pooled) == 4 * row_bytes


def test_a_choice_counts_in_a_request() -> None:
    for sentence in (Chosen(["a"], rows=[2**32 - 1] * 50), Chosen(["a"], spans=[(2**32 - 1, 2**32 - 1)] * 50)):
        [source] = parse_sentences([sentence], None, False)
        source.write(message := pb.Sentence())
        assert message.ByteSize() + 8 <= source.request_bytes


# ---- what comes back ----


@WAYS
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_those_of_the_whole_sentence(either: Either, embed: Any, dtype: str) -> None:
    for layers, unit in itertools.product(LAYERS, (False, True)):
        options = {**layers, "dtype": dtype, "l2_normalize": unit}
        [by_text, by_tokens] = embed(either, [TEXT, WORDS], **options)
        rows = [4, 0, 0, 2]
        found = embed(either, [Chosen(TEXT, rows=rows), WORDS, Chosen(WORDS, rows=rows)], **options)
        for one, whole in ((found[0], by_text), (found[2], by_tokens)):
            assert one.tokens == tuple(WORDS[row] for row in rows)
            assert one.offsets == (None if whole.offsets is None else tuple(whole.offsets[row] for row in rows))
            assert np.array_equal(one.vectors, whole.vectors[..., rows, :])
        assert same(found[1], by_tokens)


CHOICES: list[Any] = [
    Chosen(TEXT, rows=[3, 0, 3]),
    Chosen(WORDS, rows=[1]),
    Chosen(TEXT, spans=[(0, 2), (1, 5), (4, 5)]),
    Chosen(TEXT, spans=[(0, 1), (5, 8), (3, 24)], span_unit="bytes"),
    Chosen(TEXT, spans=[(0, 5), (17, 18)], span_unit="characters"),
    TEXT,
    WORDS,
]


@WAYS
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_earlier_server_leads_to_the_same_vectors(
    connect: Connect, scripted: Scripted, embed: Any, pool: str, dtype: str
) -> None:
    for layers, unit in itertools.product(LAYERS, (False, True)):
        options = {**layers, "dtype": dtype, "l2_normalize": unit, "pool": pool}
        scripted.service.serve(FakeModel())
        expected = embed(connect(), CHOICES, **options)
        be_earlier(scripted)
        found = embed(connect(), CHOICES, **options)
        assert [each.vectors.shape[-2:-1] for each in found[2:5]] == [(3,), (3,), (2,)]
        for one, other in zip(found, expected, strict=True):
            if unit:  # the fake adds squares up in another order
                assert np.allclose(one.vectors, other.vectors, rtol={"float32": 1e-6}.get(dtype, 1e-2))
            else:
                assert same(one, other)
    sent = [sentence for request in scripted.service.embed_requests[1::2] for sentence in request.sentences]
    sent += [item.item.sentence for stream in scripted.service.streams[1::2] for item in stream[1:]]
    assert {sentence.WhichOneof("selection") for sentence in sent} == {None}


@WAYS
def test_states_are_of_the_whole_sentence(either: Either, embed: Any) -> None:
    [whole] = embed(either, [WORDS], return_states=True)
    [chosen] = embed(either, [Chosen(WORDS, rows=[0])], return_states=True)
    assert chosen.state == whole.state is not None


BAD: list[Any] = [
    Chosen(WORDS, rows=[]),
    Chosen(WORDS, rows=[0, 5]),
    Chosen(WORDS, spans=[]),
    Chosen(WORDS, spans=[(0, 1), (2, 2)]),
    Chosen(WORDS, spans=[(3, 1)]),
    Chosen(WORDS, spans=[(4, 6)]),
    Chosen(TEXT, spans=[(6, 7)], span_unit="bytes"),
    Chosen(TEXT, spans=[(20, 25)], span_unit="bytes"),
    Chosen(TEXT, spans=[(16, 20)], span_unit="characters"),
]


@WAYS
def test_what_cannot_be_chosen_is_that_sentences_error(either: Either, embed: Any) -> None:
    sentences = [each for one in BAD for each in (one, Chosen(WORDS, rows=[1]))]
    found = embed(either, sentences, pool="mean", on_error="return")
    for index, error in enumerate(found[::2]):
        assert isinstance(error, SentenceError)
        assert (error.reason, error.index) == ("SELECTION_INVALID", 2 * index)
    assert all(isinstance(each, Embedding) for each in found[1::2])
    with pytest.raises(SentenceError, match="SELECTION_INVALID"):
        embed(either, [Chosen(WORDS, rows=[7])])


@WAYS
def test_a_sentence_without_tokens_cannot_be_pooled(either: Either, embed: Any) -> None:
    empty, good = embed(either, [[], Chosen(WORDS, rows=[0])][::-1], pool="max", on_error="return")[::-1]
    assert isinstance(empty, SentenceError)
    assert empty.reason == "POOLING_EMPTY"
    assert isinstance(good, Embedding)


def test_a_server_that_ignores_a_choice_is_noticed(connect: Connect, scripted: Scripted) -> None:
    scripted.service.fake = FakeService([FakeModel(features=())])  # which took the place of the server that was asked
    client = connect()
    with pytest.raises(MalformedResponseError, match="expected 2 chosen rows, got 5"):
        client.embed(Chosen(TEXT, rows=[0, 1]))
    with pytest.raises(MalformedResponseError, match="axes"):
        client.embed(Chosen(TEXT, spans=[(0, 1)]), pool="mean")


# ---- streams ----


def test_a_stream_asks_what_the_server_can_do_at_its_first_choice_only(connect: Connect, scripted: Scripted) -> None:
    client = connect()
    by_stream(client, ["a", "b"])
    assert scripted.service.get_model_count == 0
    assert [each.tokens for each in by_stream(client, ["a b", Chosen("c d", rows=[1]), Chosen("e", rows=[0])])] == [
        ("a", "b"), ("d",), ("e",),
    ]  # fmt: skip
    by_stream(client, [Chosen("c d", rows=[1])])
    client.embed("a")
    assert scripted.service.get_model_count == 1


@pytest.mark.parametrize("sentences", [["a b", Chosen("c d", rows=[1])], [Chosen("c d", rows=[1]), "a b"]])
def test_rows_may_come_at_any_place_in_a_stream(either: Either, sentences: list[Any]) -> None:
    found = {each.tokens for each in by_stream(either, sentences)}
    assert found == {("a", "b"), ("d",)}


def test_a_stream_that_has_begun_to_pool_cannot_turn_to_choosing_here(connect: Connect, scripted: Scripted) -> None:
    be_earlier(scripted)
    results = connect().embed_stream(["a b", "c", Chosen("c d", rows=[1])], pool="mean", window=1)
    next(results)
    next(results)
    with pytest.raises(UnsupportedError, match="begin it with a Chosen"):
        next(results)


def test_choices_are_sent_again_when_a_stream_is_resumed(either: Either, scripted: Scripted) -> None:
    scripted.service.stream_acts.append(scripted.service.answer_then_fail(1))
    sentences = [Chosen(WORDS, rows=[i]) for i in range(5)]
    found = by_stream(either, sentences, layers="top", pool="max")
    assert len(scripted.service.streams) == 2
    [whole] = by_call(either, [WORDS], layers="top")
    assert all(np.array_equal(each.vectors, whole.vectors[i]) for i, each in enumerate(found))


def test_a_stream_that_carries_its_state_may_choose(either: Either) -> None:
    whole = by_stream(either, [WORDS, WORDS], carry_state=True)
    chosen = by_stream(either, [Chosen(WORDS, rows=[1]), Chosen(WORDS, rows=[0])], carry_state=True)
    assert np.array_equal(chosen[1].vectors, whole[1].vectors[:, [0]])


def test_what_fits_no_request_is_chosen_by_stream(either: Either, scripted: Scripted) -> None:
    scripted.service.model.limits.max_tokens_per_request = 4
    found = either.embed(["a", Chosen(WORDS, rows=[4, 1])])
    assert found[1].tokens == (WORDS[4], WORDS[1])
    assert len(scripted.service.streams) == 1


def test_the_fake_chooses_too() -> None:
    with FakeClient() as client:
        [whole], [chosen] = client.embed([WORDS]), client.embed(Chosen(WORDS, rows=[3]))
        assert np.array_equal(chosen.vectors, whole.vectors[:, [3]])
        spans = client.embed([Chosen(TEXT, spans=[(0, 12), (20, 23)], span_unit="bytes")], pool="max", layers="top")
        assert np.array_equal(spans[0].vectors[0], whole.vectors[-1, :2].max(0))
        assert np.array_equal(spans[0].vectors[1], whole.vectors[-1, 4])
        with pytest.raises(SentenceError, match="SELECTION_INVALID"):
            client.embed(Chosen(WORDS, rows=[5]))
