"""Treebanks of Universal Dependencies: sentences of words, each with its universal part-of-speech tag.

Source: the CoNLL-U format, https://universaldependencies.org/format.html: ten columns parted by tabs, a blank line
after each sentence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bilm_system.files import read_text, reason

from bilm_training.errors import CorpusError

_COLUMNS = 10
_ID, _FORM, _UPOS = 0, 1, 3
_WORD = re.compile(r"[1-9][0-9]*")
_NOT_A_WORD = re.compile(r"[1-9][0-9]*-[1-9][0-9]*|[0-9]+\.[1-9][0-9]*")
"""A surface form of several words ("1-2 don't"), whose words follow; or a word of the analysis only ("8.1")."""


@dataclass(frozen=True)
class TaggedSentence:
    """A sentence of a treebank.

    Attributes:
        words: as written; none empty.
        tags: UPOS of each word.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_conllu(path: Path) -> list[TaggedSentence]:
    """Return the sentences of a CoNLL-U file.

    Raises:
        CorpusError: if the file can't be read or holds no sentence, or naming its first bad line.
    """
    try:
        # Not splitlines: words may hold rarer line breaks
        lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: {reason(error)}") from error
    sentences: list[TaggedSentence] = []
    words: list[tuple[str, str]] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.startswith("#"):
            continue
        if line:
            words += _words_of(line, len(words) + 1, f"{path}:{number}")
        elif words:
            sentences.append(TaggedSentence(*map(tuple, zip(*words, strict=True))))
            words = []
    if not sentences:
        raise CorpusError(f"{path}: holds no sentence")
    return sentences


def _words_of(line: str, expected_id: int, place: str) -> list[tuple[str, str]]:
    """Return the word of a line with its tag; none on a line that stands for no word."""
    columns = line.split("\t")
    if len(columns) != _COLUMNS:
        raise CorpusError(f"{place}: expected {_COLUMNS} columns parted by tabs, found {len(columns)}")
    if _NOT_A_WORD.fullmatch(columns[_ID]):
        return []
    if not _WORD.fullmatch(columns[_ID]) or int(columns[_ID]) != expected_id:
        raise CorpusError(f"{place}: expected the word number {expected_id}, found {columns[_ID]!r}")
    if not columns[_FORM]:
        raise CorpusError(f"{place}: the word is empty")
    if columns[_UPOS] in ("", "_"):
        raise CorpusError(f"{place}: the word {columns[_FORM]!r} has no UPOS tag")
    return [(columns[_FORM], columns[_UPOS])]


def read_part(folder: Path, part: str) -> list[TaggedSentence]:
    """Return the sentences of a treebank's part, "train", "dev" or "test".

    Raises:
        CorpusError: if there isn't exactly one such file, or as `read_conllu`.
    """
    found = sorted(folder.glob(f"*-ud-{part}.conllu"))
    if len(found) != 1:
        raise CorpusError(f"{folder}: expected one file *-ud-{part}.conllu, found {[path.name for path in found]}")
    return read_conllu(found[0])


def sample(sentences: Sequence[TaggedSentence], max_tokens: int | None, seed: int) -> list[TaggedSentence]:
    """Whole sentences drawn at random, up to so many tokens; all, in their order, if they have no more.

    At random, as a treebank's file goes through its genres one after another.
    """
    lengths = np.array([len(sentence.words) for sentence in sentences])
    if max_tokens is None or lengths.sum() <= max_tokens:
        return list(sentences)
    order = np.random.default_rng(seed).permutation(len(sentences))
    n_kept = int(np.searchsorted(lengths[order].cumsum(), max_tokens, side="right"))
    return [sentences[index] for index in order[:n_kept]]
