"""Chosen rows and spans of a sentence: what they resolve to, and what is refused."""

from dataclasses import dataclass, replace

import pytest
from bilm_api.constants import MAX_CHOSEN_PER_TOKEN, Reason
from bilm_model.engine.types import OutputSpec
from bilm_model.scalar_mix import Selection
from bilm_server.embedding.preprocessing import Preprocessing, RequestLimits
from bilm_server.errors import RefusalError
from bilm_server.inference.types import AskedTokens, Call, Sentence
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_engine import fake_model
from tests.support.sentences import PLAIN

LIMITS = RequestLimits(
    sentences=3, tokens=30, response_bytes=10_000, sentence_tokens=20, text_bytes=2**23, stream_items=4
)
POOLED = OutputSpec(Selection("top", "mean"))
WORDS = ["zero", "one", "two", "three"]


@dataclass(frozen=True)
class Range:
    """A `Span`."""

    start: int
    end: int


def rows(*indices: int) -> AskedTokens:
    return AskedTokens(rows=indices)


def spans(*ranges: tuple[int, int], unit: str = "tokens") -> AskedTokens:
    return AskedTokens(spans=[Range(*each) for each in ranges], unit=unit)


def prepared(content: str | list[str], asked: AskedTokens, output: OutputSpec = POOLED) -> Sentence:
    sentence = Sentence(Call(), content, output, asked=asked)
    Preprocessing(fake_model(), LIMITS).prepare(sentence)
    return sentence


def chosen(sentence: Sentence) -> list[list[int]]:
    """Return the rows of each span, or all rows."""
    assert sentence.choice is not None
    indices, lengths = sentence.choice.rows.tolist(), sentence.choice.span_lengths
    if lengths is None:
        return [indices]
    assert lengths.sum() == len(indices)
    taken = iter(indices)
    return [[next(taken) for _ in range(length)] for length in lengths.tolist()]


@pytest.mark.parametrize("output", [PLAIN, POOLED])
@pytest.mark.parametrize("content", [WORDS, " ".join(WORDS)])
def test_rows_keep_their_order_and_may_come_again(content: str | list[str], output: OutputSpec) -> None:
    assert chosen(prepared(content, rows(3, 0, 3), output)) == [[3, 0, 3]]


def test_spans_of_tokens_may_overlap() -> None:
    assert chosen(prepared(WORDS, spans((0, 4), (2, 3), (1, 3)))) == [[0, 1, 2, 3], [2], [1, 2]]


TEXT = "Naïve  words, of  日本"
"""Tokens by white space: bytes 0 to 6, 8 to 14, 15 to 17, 19 to 25."""


@pytest.mark.parametrize(
    ("start", "end", "tokens"),
    [
        (0, 6, [0]),
        (0, 1, [0]),
        (3, 4, [0]),  # the second byte of ï
        (5, 9, [0, 1]),
        (6, 9, [1]),
        (6, 8, None),
        (7, 8, None),
        (8, 14, [1]),
        (13, 15, [1]),
        (13, 16, [1, 2]),
        (14, 15, None),
        (17, 19, None),
        (17, 20, [3]),
        (24, 25, [3]),
        (0, 25, [0, 1, 2, 3]),
        (24, 26, None),
    ],
)
def test_a_span_of_bytes_takes_every_token_that_it_has_something_of(
    start: int, end: int, tokens: list[int] | None
) -> None:
    asked = spans((start, end), unit="bytes")
    if tokens is not None:
        assert chosen(prepared(TEXT, asked)) == [tokens]
        return
    with pytest.raises(RefusalError) as refusal:
        prepared(TEXT, asked)
    assert refusal.value.reason is Reason.SELECTION_INVALID


@given(st.lists(st.sampled_from(["a", "ß", "日本", " ", "  ", "xyz"]), max_size=12).map("".join), st.data())
def test_spans_of_bytes_are_what_a_look_at_each_byte_finds(text: str, data: st.DataObject) -> None:
    n_bytes = len(text.encode())
    if not text.split():
        return
    start = data.draw(st.integers(0, n_bytes - 1))
    end = data.draw(st.integers(start + 1, n_bytes))
    whole = Sentence(Call(), text, PLAIN)
    Preprocessing(fake_model(), LIMITS).prepare(whole)
    touched = [
        i
        for i, bounds in enumerate(zip(whole.starts, whole.ends, strict=True))
        if set(range(*bounds)) & set(range(start, end))
    ]
    if touched:
        assert chosen(prepared(text, spans((start, end), unit="bytes"))) == [touched]
        return
    with pytest.raises(RefusalError) as refusal:
        prepared(text, spans((start, end), unit="bytes"))
    assert refusal.value.reason is Reason.SELECTION_INVALID


@pytest.mark.parametrize(
    ("content", "asked", "output", "words"),
    [
        (WORDS, rows(), PLAIN, "rows: none (expected at least one)"),
        (WORDS, rows(1, 4), PLAIN, "rows: 4 is out of range (the sentence has 4 tokens)"),
        (WORDS, rows(2**32 - 1), PLAIN, "rows: 4294967295 is out of range (the sentence has 4 tokens)"),
        ([], rows(0), PLAIN, "rows: the sentence has no tokens"),
        (WORDS, rows(*[0] * 21), PLAIN, "rows: 21 are more than 20"),
        (["a", "w" * 2**17], rows(*[1] * 9), PLAIN, f"rows: {9 * 2**17} characters together are more than {2**20}"),
        (WORDS, spans((0, 1)), PLAIN, "spans: they need a pooling"),
        (WORDS, spans(), POOLED, "spans: none (expected at least one)"),
        (WORDS, spans((0, 1), (2, 2)), POOLED, "spans[1]: 2 to 2 "),
        (WORDS, spans((3, 1)), POOLED, "spans[0]: 3 to 1 "),
        (WORDS, spans((0, 5)), POOLED, "spans[0]: 0 to 5 (expected a range that isn't empty, of the sentence's 4 "),
        (WORDS, spans((4, 5)), POOLED, "spans[0]: 4 to 5 "),
        (WORDS, spans(*[(0, 4)] * 6), POOLED, "spans: 24 tokens together are more than 20"),
        (WORDS, spans(*[(0, 1)] * 21), POOLED, "spans: 21 are more than 20"),
        (WORDS, spans((0, 1), unit="bytes"), POOLED, "spans.unit: bytes need a text"),
        ("a b", spans((0, 4), unit="bytes"), POOLED, "spans[0]: 0 to 4 (expected a range that isn't empty, of the "),
        ("a b", spans((0, 1), (1, 2), unit="bytes"), POOLED, "spans[1]: no token has any of the bytes 1 to 2"),
        ("a b", spans((0, 1), unit="7"), POOLED, "spans.unit: unsupported value 7 "),
    ],
)  # fmt: skip
def test_a_selection_that_cannot_be(
    content: str | list[str], asked: AskedTokens, output: OutputSpec, words: str
) -> None:
    with pytest.raises(RefusalError) as refusal:
        prepared(content, asked, output)
    assert refusal.value.reason is Reason.SELECTION_INVALID
    assert str(refusal.value).startswith(words)


def test_each_token_may_be_chosen_so_often_on_average() -> None:
    wide = Preprocessing(fake_model(), replace(LIMITS, tokens=1000, sentence_tokens=1000))

    def refused(asked: AskedTokens) -> bool:
        sentence = Sentence(Call(), ["a", "b"], POOLED, asked=asked)
        return wide.prepare_all([sentence])[0] is not None

    assert not refused(rows(*[0] * 2 * MAX_CHOSEN_PER_TOKEN))
    assert refused(rows(*[0] * (2 * MAX_CHOSEN_PER_TOKEN + 1)))
    assert not refused(spans(*[(0, 2)] * MAX_CHOSEN_PER_TOKEN))
    assert refused(spans(*[(0, 2)] * MAX_CHOSEN_PER_TOKEN, (0, 1)))


def test_a_long_token_may_come_back_once() -> None:
    assert chosen(prepared(["w" * (2**20 + 1)], rows(0), PLAIN)) == [[0]]


def test_an_empty_sentence_that_is_pooled_is_refused_as_without_a_selection() -> None:
    with pytest.raises(RefusalError) as refusal:
        prepared([], rows(0), POOLED)
    assert refusal.value.reason is Reason.POOLING_EMPTY


def test_what_was_asked_is_let_go_once_it_is_prepared() -> None:
    assert prepared(WORDS, rows(0)).asked is None


def test_a_token_counts_in_a_request_as_often_as_it_is_chosen() -> None:
    preprocessing = Preprocessing(fake_model(), LIMITS)

    def new(count: int) -> list[Sentence]:
        return [Sentence(Call(), ["a"], PLAIN, asked=rows(*[0] * 15)), Sentence(Call(), ["b"] * count, PLAIN)]

    assert preprocessing.prepare_all(new(15)) == [None, None]
    with pytest.raises(RefusalError) as refusal:
        preprocessing.prepare_all(new(16))
    assert refusal.value.reason is Reason.TOO_MANY_TOKENS


@pytest.mark.parametrize(
    ("asked", "output", "n_bytes"),
    [
        (rows(0), PLAIN, 3 * 4 * 4),
        (rows(1, 1, 1, 1, 0), PLAIN, 5 * 3 * 4 * 4),
        (rows(1, 1, 0), POOLED, 4 * 4),
        (spans((0, 4), (1, 2), (2, 3)), POOLED, 3 * 4 * 4),
        (spans((0, 4)), replace(POOLED, data_type="float16"), 4 * 2),
    ],
)
def test_only_what_comes_back_is_priced(asked: AskedTokens, output: OutputSpec, n_bytes: int) -> None:
    assert Preprocessing(fake_model(), LIMITS).computed_bytes(prepared(WORDS, asked, output)) == n_bytes
