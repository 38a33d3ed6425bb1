from dataclasses import replace
from typing import Any

import pytest
from bilm_api.constants import Reason
from bilm_model.engine.types import OutputSpec
from bilm_model.scalar_mix import Selection
from bilm_model.tokenization.deferred import DeferredTokenizer
from bilm_model.tokenization.whitespace import WhitespaceTokenizer
from bilm_server.embedding.conversions import INLINE_BYTES
from bilm_server.embedding.preprocessing import Preprocessing, RequestLimits
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Call, Sentence

from tests.support.fake_engine import CountCodec, FakeEngine, fake_model
from tests.support.sentences import PLAIN

LIMITS = RequestLimits(
    sentences=3, tokens=1000, response_bytes=10_000, sentence_tokens=50, text_bytes=600, stream_items=4
)
POOLED = OutputSpec(Selection("top", "mean"), "float16")


def preprocessing(codec: CountCodec | None = CountCodec()) -> Preprocessing:  # noqa: B008 - it has no state
    return Preprocessing(fake_model(FakeEngine(codec=codec)), LIMITS)


def sentence(content: str | list[str] | None, output: OutputSpec = PLAIN, **fields: Any) -> Sentence:
    return Sentence(Call(), content, output, **fields)


def refusal_of(asked: Sentence, codec: CountCodec | None = CountCodec()) -> Reason:  # noqa: B008 - it has no state
    with pytest.raises(RefusalError) as refusal:
        preprocessing(codec).prepare(asked)
    return refusal.value.reason


# ---- what a request is taken to cost ----


@pytest.mark.parametrize(
    ("text", "n_tokens"),
    [
        ("", 0),
        (" \t\n\u2003", 0),
        ("a", 1),
        (" a ", 1),
        ("a" * 6, 1),
        ("a" * 7, 2),
        ("ä" * 3, 1),
        ("ä" * 4, 2),
        ("🙂" * 3, 2),
        ("a" * 600, 100),
        ("a" * 601, 0),  # refused without being tokenised
        ("ä" * 301, 0),
    ],
)
def test_text_is_priced_by_its_bytes(text: str, n_tokens: int) -> None:
    assert preprocessing().price([sentence(text)]) == n_tokens


@pytest.mark.parametrize(("given", "n_tokens"), [(0, 0), (1, 1), (50, 50), (51, 0)])
def test_tokens_are_priced_as_they_are(given: int, n_tokens: int) -> None:
    assert preprocessing().price([sentence(["a long token"] * given)]) == n_tokens


def test_a_sentence_without_input_costs_nothing() -> None:
    assert preprocessing().price([sentence(None)]) == 0


def test_a_request_is_priced_as_the_sum_of_its_sentences() -> None:
    assert preprocessing().price([sentence("seven b"), sentence(["a"] * 3)] * 2) == 10


def test_a_request_is_priced_at_no_more_than_it_may_have() -> None:
    assert preprocessing().price([sentence("a" * 600)] * 11) == 1000
    with pytest.raises(RefusalError) as refusal:
        preprocessing().price([sentence(["a"] * 50)] * 21)
    assert refusal.value.reason is Reason.TOO_MANY_TOKENS


@pytest.mark.parametrize(("count", "reason"), [(0, Reason.SENTENCES_MISSING), (4, Reason.TOO_MANY_SENTENCES)])
def test_a_request_has_a_sentence_and_not_too_many(count: int, reason: Reason) -> None:
    LIMITS.check_count(3)
    with pytest.raises(RefusalError) as refusal:
        LIMITS.check_count(count)
    assert refusal.value.reason is reason


# ---- what is made of a sentence ----


def test_text_is_tokenised_with_offsets() -> None:
    asked = sentence("Naïve  words")
    preprocessing().prepare(asked)
    assert (asked.tokens, asked.starts, asked.ends) == (("Naïve", "words"), (0, 8), (6, 13))
    assert not asked.truncated


def test_tokens_stay_as_they_are() -> None:
    asked = sentence(["a b", "x" * 49], state_bytes=CountCodec().encode(7))
    preprocessing().prepare(asked)
    assert (asked.tokens, asked.starts, asked.ends) == (("a b", "x" * 49), (), ())
    assert asked.truncated
    assert asked.state == 7


def test_what_was_sent_is_let_go_once_it_is_prepared() -> None:
    asked = sentence(["a"], state_bytes=CountCodec().encode(7))
    preprocessing().prepare(asked)
    assert (asked.content, asked.state_bytes) == (None, b"")
    assert (asked.tokens, asked.state) == (("a",), 7)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (sentence(None), Reason.SENTENCE_MISSING),
        (sentence("a" * 601), Reason.SENTENCE_TOO_LONG),
        (sentence("a " * 51), Reason.SENTENCE_TOO_LONG),
        (sentence(["a"] * 51), Reason.SENTENCE_TOO_LONG),
        (sentence(["a", ""]), Reason.TOKEN_EMPTY),
        (sentence(" ", POOLED), Reason.POOLING_EMPTY),
        (sentence(["a"], state_bytes=b"short"), Reason.STATE_INVALID),
    ],
)
def test_bad_sentences_are_refused(asked: Sentence, reason: Reason) -> None:
    assert refusal_of(asked) is reason


@pytest.mark.parametrize("fields", [{"state_bytes": bytes(8)}, {"return_state": True}])
def test_a_model_without_states_takes_and_gives_none(fields: dict[str, Any]) -> None:
    assert refusal_of(sentence(["a"], **fields), codec=None) is Reason.STATE_INVALID
    preprocessing(codec=None).prepare(sentence(["a"]))


def test_what_is_wrong_with_one_sentence_is_said_of_it_alone() -> None:
    sentences = [sentence(["a"]), sentence(["b", ""]), sentence(["c"])]
    refusals = preprocessing().prepare_all(sentences)
    assert [refusal and refusal.reason for refusal in refusals] == [None, Reason.TOKEN_EMPTY, None]
    assert sentences[2].tokens == ("c",)


def test_too_many_tokens_end_the_request_before_the_rest_is_tokenised() -> None:
    sentences = [sentence("a " * 50) for _ in range(25)]
    with pytest.raises(RefusalError) as refusal:
        preprocessing().prepare_all(sentences)
    assert refusal.value.reason is Reason.TOO_MANY_TOKENS
    assert [bool(each.tokens) for each in sentences] == [True] * 21 + [False] * 4


@pytest.mark.parametrize(
    ("asked", "n_bytes"),
    [
        (sentence(["a", "b"]), 2 * 3 * 4 * 4),
        (sentence(["a", "b"], return_state=True), 2 * 3 * 4 * 4 + 8),
        (sentence(["a", "b"], POOLED), 4 * 2),
        (sentence([]), 0),
    ],
)
def test_the_size_of_a_result_is_known_before_it_is_computed(asked: Sentence, n_bytes: int) -> None:
    found = preprocessing()
    found.prepare(asked)
    assert found.computed_bytes(asked) == n_bytes


def test_the_first_text_is_not_prepared_on_the_event_loop() -> None:
    tokenizer = DeferredTokenizer("white space", WhitespaceTokenizer)
    prepared = Preprocessing(replace(fake_model(FakeEngine()), tokenizer=tokenizer), LIMITS)
    text, words = [sentence("a"), sentence(["b"])], [sentence(["b"])]
    assert prepared.weight(text, 10) > INLINE_BYTES >= prepared.weight(words, 10)
    tokenizer.load()
    assert prepared.weight(text, 10) <= INLINE_BYTES
