"""A text file as tokens, without being read into memory.

A line is a sentence or a paragraph: "<S>", its words, "</S>". Words are what white space leaves, nothing more is done
to them: no case folding, no Unicode normalisation, apostrophes and punctuation as the text has them. A line without
words counts too, so that perplexities are per token with end of line, as usual for WikiText.
"""

import hashlib
import mmap
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from bilm_model.characters import BEGIN_TOKEN, END_TOKEN
from bilm_system.files import open_ordinary, reason, text_start
from numpy.typing import NDArray
from tqdm import tqdm

from bilm_training.data.vocabulary import UNKNOWN
from bilm_training.errors import CorpusError

# A block is what is split into words at a time: small enough that several for each stream can stay in memory
_BLOCK_BYTES = 4096
_CACHED_BLOCKS = 1024


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text file, mapped into memory, and where its blocks of lines begin.

    Attributes:
        path: the file.
        n_tokens: words and boundaries.
        digest: hash of the text, less a byte order mark, which is no part of it: a run continues with the text that it
            began with, or not at all.
    """

    path: Path
    n_tokens: int
    digest: str
    _data: bytes | mmap.mmap
    _offsets: NDArray[np.int64]
    _first_tokens: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path, counts: Counter[str] | None = None, max_counted: int = 10_000_000) -> "Corpus":
        """Go through a file once: check it, note where its lines are, and count its words if asked to.

        Args:
            path: UTF-8, a sentence or paragraph a line. LF ends a line; any other line break is white space.
            counts: receives how often each word stands there.
            max_counted: different words to keep count of; beyond, the rarest count as "<unk>".

        Raises:
            CorpusError: if the file can't be read, isn't UTF-8 or holds no word.
        """
        data = _map(path)
        first = _text_start(path, data)
        offsets, first_tokens, n_tokens, n_words = [first], [0], 0, 0
        digest = hashlib.blake2b(digest_size=16)
        bar = tqdm(total=len(data), desc=f"reading {path.name}", unit="B", unit_scale=True, leave=False, delay=1)
        with bar:
            for start, end in _blocks(data, first):
                block = data[start:end]
                digest.update(block)
                lines = _lines(path, data, start, block)
                words = [word for line in lines for word in line]
                n_words += len(words)
                n_tokens += len(words) + 2 * len(lines)
                offsets.append(end)
                first_tokens.append(n_tokens)
                if counts is not None:
                    _count(counts, words, max_counted)
                bar.update(end - start)
        if not n_words:
            raise CorpusError(f"{path}: holds no word")
        index = np.array(offsets, np.int64), np.array(first_tokens, np.int64)
        return cls(path, n_tokens, digest.hexdigest(), data, *index)

    def tokens(self, start: int, end: int) -> list[str]:
        """Tokens from..to, boundaries included, in reading order."""
        found: list[str] = []
        block = int(np.searchsorted(self._first_tokens, start, side="right")) - 1
        while len(found) < end - start:
            tokens = self._block(block)
            skipped = max(0, start - int(self._first_tokens[block]))
            found += tokens[skipped : skipped + end - start - len(found)]
            block += 1
        return found

    @lru_cache(_CACHED_BLOCKS)  # noqa: B019 - a corpus lives as long as the run
    def _block(self, number: int) -> list[str]:
        start, end = self._offsets[number : number + 2].tolist()
        lines = _lines(self.path, self._data, start, self._data[start:end])
        return [token for line in lines for token in (BEGIN_TOKEN, *line, END_TOKEN)]


def _map(path: Path) -> bytes | mmap.mmap:
    try:
        with open_ordinary(path) as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: {reason(error)}") from error


def _text_start(path: Path, data: bytes | mmap.mmap) -> int:
    try:
        return text_start(data[:4])
    except ValueError as error:
        raise CorpusError(f"{path}: {error}") from error


def _blocks(data: bytes | mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Yield where blocks of whole lines begin and end, from the byte on at which the text does."""
    while start < len(data):
        newline = data.find(b"\n", start + _BLOCK_BYTES)
        end = len(data) if newline < 0 else newline + 1
        yield start, end
        start = end


def _lines(path: Path, data: bytes | mmap.mmap, start: int, block: bytes) -> list[list[str]]:
    """Return the words of each line of a block."""
    try:
        lines = block.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        number = data[: start + error.start].count(b"\n") + 1
        raise CorpusError(f"{path}, line {number}: not UTF-8 ({error.reason}, byte {start + error.start})") from error
    if not lines[-1]:
        lines.pop()  # what follows the last line's end is no line
    return [line.split() for line in lines]


def _count(counts: Counter[str], words: list[str], max_counted: int) -> None:
    """Add words; when there are too many different ones, those seen once, then twice, and so on, become "<unk>".

    Source: `ReduceVocab` of word2vec.
    """
    counts.update(words)
    bound = 1
    while len(counts) > max_counted:
        for word in [word for word, count in counts.items() if count <= bound and word != UNKNOWN]:
            counts[UNKNOWN] += counts.pop(word)
        bound += 1
