from collections import Counter
from collections.abc import Sequence

import pytest
from bilm_training.data.typos import is_word, with_typos
from hypothesis import given
from hypothesis import strategies as st

SENTENCES = [("The", "cat", "sat", ",", "42", "!"), ("a", "aa", "n't")] * 50
N_WORDS = 50 * 6

WORDS = st.lists(st.lists(st.text("aab한글é-1", min_size=1, max_size=5), max_size=6), max_size=6)


def kind(before: str, after: str) -> str:
    if len(after) != len(before):
        return "inserted" if len(after) > len(before) else "deleted"
    different = [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if len(different) == 1:
        return "replaced"
    first, second = different
    assert second == first + 1
    assert (before[first], before[second]) == (after[second], after[first])
    return "swapped"


def changes(sentences: Sequence[tuple[str, ...]], found: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    pairs = zip(sentences, found, strict=True)
    return [(a, b) for before, after in pairs for a, b in zip(before, after, strict=True) if a != b]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_exactly_the_share_of_the_words_changes(share: float) -> None:
    found = changes(SENTENCES, with_typos(SENTENCES, share, seed=1))
    assert len(found) == round(share * N_WORDS)
    assert all(is_word(before) for before, _ in found)


def test_all_kinds_that_apply_are_as_likely() -> None:
    sentences = [("abcde",)] * 2000
    kinds = Counter(kind(*pair) for pair in changes(sentences, with_typos(sentences, 1, seed=1)))
    assert set(kinds) == {"inserted", "deleted", "replaced", "swapped"}
    assert all(440 < count < 560 for count in kinds.values())  # 500 ± 3 standard deviations


def test_a_word_of_one_letter_is_neither_deleted_nor_swapped() -> None:
    sentences = [("a",), ("b",)] * 50
    kinds = Counter(kind(*pair) for pair in changes(sentences, with_typos(sentences, 1, seed=1)))
    assert set(kinds) == {"inserted", "replaced"}


def test_the_only_letter_of_a_text_is_not_replaced_by_itself() -> None:
    assert with_typos([("a",)] * 20, 1, seed=1) == [("aa",)] * 20


def test_letters_come_from_the_text() -> None:
    sentences = [("우리는", "학교에", "갔다", "."), ("그는", "집에", "있다", "!")] * 20
    found = with_typos(sentences, 1, seed=1)
    assert len(changes(sentences, found)) == 6 * 20
    assert {c for words in found for word in words for c in word} <= {
        c for words in sentences for w in words for c in w
    }


def test_the_seed_decides() -> None:
    assert with_typos(SENTENCES, 0.3, seed=1) == with_typos(SENTENCES, 0.3, seed=1)
    assert with_typos(SENTENCES, 0.3, seed=1) != with_typos(SENTENCES, 0.3, seed=2)


@given(WORDS, st.floats(0, 1), st.integers(0, 9))
def test_a_typo_is_one_change_that_leaves_a_word(sentences: list[list[str]], share: float, seed: int) -> None:
    given_ = [tuple(words) for words in sentences]
    found = changes(given_, with_typos(sentences, share, seed))
    assert len(found) == round(share * sum(is_word(word) for words in sentences for word in words))
    assert all(after and kind(before, after) for before, after in found)


def test_a_share_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"expected 0 to 1, found 1\.5"):
        with_typos(SENTENCES, 1.5, seed=1)
