import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from bilm_model.errors import AlignmentError, LanguageError
from bilm_model.tokenization.deferred import DeferredTokenizer
from bilm_model.tokenization.moses import SacremosesTokenizer
from bilm_model.tokenization.moses_languages import MOSES_LANGUAGES
from bilm_model.tokenization.tokenizers import deferred_tokenizer, new_tokenizer
from bilm_model.tokenization.types import Tokenizer
from bilm_model.tokenization.whitespace import WhitespaceTokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from sacremoses.corpus import NonbreakingPrefixes

MOSES, WHITESPACE = SacremosesTokenizer("en"), WhitespaceTokenizer()


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (MOSES, "Hello, world! Don't wait...", ["Hello", ",", "world", "!", "Don", "'t", "wait", "..."]),
        (MOSES, "<b> & [x] | “naïve”", ["<", "b", ">", "&", "[", "x", "]", "|", "“", "naïve", "”"]),  # no escaping
        (SacremosesTokenizer("ko"), "서울은 수도이다.", ["서울은", "수도이다", "."]),
        (WHITESPACE, " Hello,\tworld!\u3000é ", ["Hello,", "world!", "é"]),
        (MOSES, "", []),
        (WHITESPACE, " \n", []),
    ],
)
def test_tokens_and_their_bytes(tokenizer: Tokenizer, text: str, expected: list[str]) -> None:
    found = tokenizer(text)
    assert list(found.tokens) == expected
    data = text.encode()
    assert [data[start:end].decode() for start, end in zip(found.starts, found.ends, strict=True)] == expected


def test_control_characters_inside_a_token_are_part_of_its_place() -> None:
    found = MOSES("a\x00b c")
    assert found.tokens == ("ab", "c")
    assert list(zip(found.starts, found.ends, strict=True)) == [(0, 3), (4, 5)]


def test_what_the_tokenizer_changed_is_refused_not_misplaced() -> None:
    with pytest.raises(AlignmentError, match="changed characters"):
        MOSES("DOTMULTI")  # a placeholder of the library's own


@given(st.text())
@example("a\u200d\u00adb ... .. DOTDOTMULTI")
@example("İ i̇ ß ﬀ")
def test_any_text_has_ordered_places_or_a_refusal(text: str) -> None:
    for tokenizer in (MOSES, WHITESPACE):
        try:
            found = tokenizer(text)
        except AlignmentError:
            continue
        data, end = text.encode(), 0
        for token, start, stop in zip(found.tokens, found.starts, found.ends, strict=True):
            assert end <= start < stop <= len(data)
            piece = data[start:stop].decode()
            assert piece == token or [c for c in piece if c in token]
            end = stop


def test_an_unknown_language_is_not_taken_for_english() -> None:
    with pytest.raises(LanguageError, match="expected one of as, .*, found 'xx'"):
        SacremosesTokenizer("xx")


def test_choice_by_name() -> None:
    assert isinstance(new_tokenizer("whitespace", "xx"), WhitespaceTokenizer)
    assert new_tokenizer("moses", "ko").name.startswith("moses-ko ")
    with pytest.raises(LanguageError):
        new_tokenizer("moses", "xx")


def test_names() -> None:
    assert WHITESPACE.name == "whitespace"
    assert MOSES.name.startswith("moses-en (sacremoses ")


def test_the_languages_are_those_of_sacremoses() -> None:
    assert {*NonbreakingPrefixes().available_langs.values(), "ja", "ko"} == MOSES_LANGUAGES


def test_a_deferred_tokenizer_is_loaded_once_whoever_asks_first() -> None:
    made: list[str] = []

    def new() -> Tokenizer:
        made.append(threading.current_thread().name)
        return WHITESPACE

    deferred = DeferredTokenizer("white space", new)
    assert (deferred.name, deferred.loaded, made) == ("white space", False, [])
    with ThreadPoolExecutor(4) as threads:
        assert {found.tokens for found in threads.map(deferred, ["a b"] * 20)} == {("a", "b")}
    deferred.load()
    assert (deferred.loaded, len(made)) == (True, 1)


def test_a_deferred_tokenizer_that_cannot_be_loaded_is_tried_again() -> None:
    outcomes: Iterator[Exception | Tokenizer] = iter([ImportError("no such library"), WHITESPACE])

    def new() -> Tokenizer:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    deferred = DeferredTokenizer("white space", new)
    with pytest.raises(ImportError):
        deferred.load()
    assert not deferred.loaded
    assert deferred("a").tokens == ("a",)


def test_a_deferred_tokenizer_has_the_name_and_the_languages_of_the_loaded_one() -> None:
    assert deferred_tokenizer("moses", "de").name == new_tokenizer("moses", "de").name
    assert deferred_tokenizer("whitespace", "en").name == WHITESPACE.name
    with pytest.raises(LanguageError, match="expected one of as, bn, .*, found 'xx'"):
        deferred_tokenizer("moses", "xx")
