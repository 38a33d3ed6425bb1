"""The sentences that are sent: those of a text, so that their lengths and words are real ones."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from bilm_client._core.inputs import WholeSentence
from bilm_client.cli.settings_sources import UsageError
from bilm_system.files import check_readable, reason, text_start

_ENDS = (".", "?", "!")
_HEADING = "="


def read_sentences(path: Path, *, running: bool, raw: bool, at_most: int) -> list[WholeSentence]:
    """Return the first sentences of a UTF-8 text, as text if `raw`, otherwise as what stands between white space.

    Args:
        path: The text.
        running: Whether its lines are paragraphs, to be cut into sentences, and headings (= … =), to be left out;
            otherwise each line is a sentence. Blank lines are left out.
        raw: Whether the server is to tokenise.
        at_most: Sentences to read.

    Raises:
        UsageError: The text can't be read or has no sentence.
    """
    try:
        check_readable(path)
        with path.open("rb") as file:
            file.seek(text_start(file.read(4)))
            # A line ends as bilm-embed has it: with LF, and any other line break is white space
            lines = (line.decode("utf-8").strip() for line in file)
            words = (line.split() for line in lines if line and not (running and line.startswith(_HEADING)))
            cut = (sentence for line in words for sentence in (_cut(line, raw) if running else [line]))
            sentences: list[WholeSentence] = [" ".join(words) if raw else words for words in islice(cut, at_most)]
    except (OSError, ValueError) as error:
        raise UsageError(f"text: {path}: {reason(error)}") from error
    if not sentences:
        raise UsageError(f"text: {path}: has no sentence")
    return sentences


def n_words(sentence: WholeSentence) -> int:
    """Return the tokens of a sentence; of text an estimate, the words."""
    return len(sentence.split()) if isinstance(sentence, str) else len(sentence)


def describe(sentences: list[WholeSentence]) -> dict[str, Any]:
    """Return what a report has of the text."""
    lengths = [n_words(sentence) for sentence in sentences]
    return {
        "sentences": len(sentences),
        "tokens": sum(lengths),
        "median_tokens": median(lengths),
        "longest_tokens": max(lengths),
    }


def _cut(words: list[str], raw: bool) -> Iterator[list[str]]:
    """Yield the sentences of a paragraph: tokenised text has the end as its own token, raw text within a word."""
    sentence: list[str] = []
    for word in words:
        sentence.append(word)
        if word.endswith(_ENDS) if raw else word in _ENDS:
            yield sentence
            sentence = []
    if sentence:
        yield sentence
