"""Real sentences: WikiText-2's test part, cut after full stops, question and exclamation marks.

Knows no torch: the load generator reads them too.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle

from benchmarks.paths import WIKITEXT

DATA = WIKITEXT / "test.txt"

_ENDS = (".", "?", "!")


def read_sentences(n_sentences: int) -> list[list[str]]:
    """Return the first sentences of `DATA`, which has white space between its tokens."""
    sentences: list[list[str]] = []
    sentence: list[str] = []
    for token in DATA.read_text(encoding="utf-8").split():
        sentence.append(token)
        if token in _ENDS:
            sentences.append(sentence)
            sentence = []
            if len(sentences) == n_sentences:
                break
    return sentences


def sentence_of(n_tokens: int, sentences: Sequence[Sequence[str]]) -> list[str]:
    """Return one sentence of exactly so many tokens, of running text."""
    words: Iterator[str] = cycle(token for sentence in sentences for token in sentence)
    return [next(words) for _ in range(n_tokens)]


def distinct_words(sentences: Sequence[Sequence[str]]) -> list[str]:
    """Return every word once, in order of appearance."""
    return list(dict.fromkeys(token for sentence in sentences for token in sentence))
