"""Plain text becomes streams of words for truncated backpropagation, without being read into memory.

A line is a sentence or a paragraph: "<S>", its words, "</S>". Words are what white space leaves, nothing more is done
to them: no case folding, no Unicode normalisation, apostrophes and punctuation as the text has them. A line without
words counts too, so that perplexities are per token with end of line, as usual for WikiText.
"""

import hashlib
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from bilm_model.characters import BEGIN_TOKEN, END_TOKEN, CharacterIds, token_ids
from bilm_model.errors import ModelError
from bilm_system.files import open_ordinary, reason, text_start
from numpy.typing import NDArray
from tqdm import tqdm

from bilm_training.data.typos import with_typos

BOUNDARY = 0
"""The class that ends a sentence: after its last word reading forward, after its first reading backward."""
UNKNOWN = "<unk>"

# A block is what is split into words at a time: small enough that several for each stream can stay in memory
_BLOCK_BYTES = 4096
_CACHED_BLOCKS = 1024
_CACHED_WORDS = 100_000


class CorpusError(ModelError):
    """Text that can't be trained on or evaluated."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that the softmax knows, most frequent first; class 0 is the sentence boundary.

    A word outside it is read by its characters all the same; as a target it counts as "<unk>".

    Attributes:
        words: by class.
        classes: the class of each word.
    """

    words: tuple[str, ...]
    classes: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        classes = {word: index for index, word in enumerate(self.words)}
        classes[BEGIN_TOKEN] = BOUNDARY
        object.__setattr__(self, "classes", classes)

    @classmethod
    def of(cls, counts: Counter[str], max_words: int | None = None) -> "Vocabulary":
        """The most frequent words, equally frequent ones in alphabetical order.

        With fewer words than the text has, or where rare ones were lost in counting, "<unk>" stands for the others.
        """
        boundaries = (BEGIN_TOKEN, END_TOKEN)  # a text may have them as words: they are read as what they mean
        words = sorted(counts.keys() - boundaries, key=lambda word: (-counts[word], word))
        if max_words is not None and len(words) > max_words:
            words = [*[word for word in words if word != UNKNOWN][: max_words - 1], UNKNOWN]
        return cls((END_TOKEN, *words))

    @classmethod
    def from_text(cls, text: str) -> "Vocabulary":
        """Reads what `to_text` wrote."""
        return cls(tuple(text.splitlines()))

    def to_text(self) -> str:
        """A word a line, by class."""
        return "".join(f"{word}\n" for word in self.words)

    def target(self, word: str) -> int:
        """The class of a word.

        Raises:
            CorpusError: if the word is unknown to a vocabulary without "<unk>".
        """
        known = self.classes.get(word, self.classes.get(UNKNOWN))
        if known is None:
            raise CorpusError(
                f"the word {word!r} is not in the vocabulary, which has no {UNKNOWN}: a run with data.max_words below "
                f"{len(self.words) - 1} has it for rare and new words"
            )
        return known


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text file, mapped into memory, and where its blocks of lines begin.

    Attributes:
        path: the file.
        n_tokens: words and boundaries.
        digest: hash of the text, less a byte order mark, which is no part of it: a run goes on with the text that it
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
        """Goes through a file once: checks it, notes where its lines are, and counts its words if asked to.

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
    """Where blocks of whole lines begin and end, from the byte on at which the text does."""
    while start < len(data):
        newline = data.find(b"\n", start + _BLOCK_BYTES)
        end = len(data) if newline < 0 else newline + 1
        yield start, end
        start = end


def _lines(path: Path, data: bytes | mmap.mmap, start: int, block: bytes) -> list[list[str]]:
    """The words of each line of a block."""
    try:
        lines = block.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        number = data[: start + error.start].count(b"\n") + 1
        raise CorpusError(f"{path}, line {number}: not UTF-8 ({error.reason}, byte {start + error.start})") from error
    if not lines[-1]:
        lines.pop()  # what follows the last line's end is no line
    return [line.split() for line in lines]


def _count(counts: Counter[str], words: list[str], max_counted: int) -> None:
    """Adds words; when there are too many different ones, those seen once, then twice, and so on, become "<unk>".

    Source: `ReduceVocab` of word2vec.
    """
    counts.update(words)
    bound = 1
    while len(counts) > max_counted:
        for word in [word for word, count in counts.items() if count <= bound and word != UNKNOWN]:
            counts[UNKNOWN] += counts.pop(word)
        bound += 1


# ---- streams ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive steps of several streams, in one direction.

    Attributes:
        tokens: (steps, streams) row of each token in `WindowPair.types`.
        targets: (steps, streams) class of the token that follows.
        counted: (steps, streams) whether the target counts; that one sentence follows another is nothing to predict.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    counted: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class WindowPair:
    """The windows of both directions at the same step.

    Attributes:
        types: (types, 50) character ids of the different tokens in them.
        forward: of the text.
        backward: of the text read from its end.
        position: number of the window's first step in its streams, for messages.
    """

    types: CharacterIds
    forward: Window
    backward: Window
    position: int

    @property
    def directions(self) -> tuple[Window, Window]:
        """Forward, backward."""
        return self.forward, self.backward


@dataclass(frozen=True, eq=False)
class Streams:
    """A text as contiguous streams of equal length, read together.

    Attributes:
        corpus: the text.
        vocabulary: that targets are looked up in.
        n_streams: of each direction.
        n_steps: steps of a window.
        whole: every token is predicted once, to the last one: the last stream begins a little earlier, and what it
            shares with the one before doesn't count. Otherwise up to `n_streams` tokens at the end are left over.
        typos: share of the words that are read with a typo, drawn anew in each epoch; what is to be predicted stays.
        seed: of the typos.
    """

    corpus: Corpus
    vocabulary: Vocabulary
    n_streams: int
    n_steps: int
    whole: bool = False
    typos: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise CorpusError(
                f"{self.corpus.path}: {self.corpus.n_tokens} tokens are too few for {self.n_streams} streams"
            )

    @property
    def length(self) -> int:
        """Steps of a stream."""
        n_steps = self.corpus.n_tokens - 1
        return -(-n_steps // self.n_streams) if self.whole else n_steps // self.n_streams

    @property
    def n_windows(self) -> int:
        """Windows until the streams end; the last one may be shorter."""
        return -(-self.length // self.n_steps)

    def check(self) -> None:
        """Makes sure that every word has a class, before hours of training.

        Raises:
            CorpusError: as `windows`.
        """
        if UNKNOWN not in self.vocabulary.classes:
            for _ in self.windows():
                pass

    def windows(self, first: int = 0, epoch: int = 1) -> Iterator[WindowPair]:
        """The windows in order, each going on where the one before it ended.

        Args:
            first: number of the first one, from 0.
            epoch: that the typos are those of.

        Raises:
            CorpusError: if a word is unknown to a vocabulary without "<unk>".
        """
        for number in range(first, self.n_windows):
            yield self._window(number * self.n_steps, epoch)

    def _window(self, start: int, epoch: int) -> WindowPair:
        end = min(start + self.n_steps, self.length) + 1  # the last step's target is one further
        last = self.corpus.n_tokens
        starts = [min(first, last - 1 - self.length) for first in self._shares]
        before = [share - (first + start) for share, first in zip(self._shares, starts, strict=True)]
        forward = [self.corpus.tokens(first + start, first + end) for first in starts]
        backward = [self.corpus.tokens(last - first - end, last - first - start)[::-1] for first in starts]
        read = [self._read(rows, (self.seed, epoch, start, d)) for d, rows in enumerate((forward, backward))]
        types = {token: n for n, token in enumerate(dict.fromkeys(t for rows in read for row in rows for t in row))}
        tokens = [np.array([[types[token] for token in row] for row in rows], np.int64).T for rows in read]
        windows = (
            Window(tokens[0], *self._targets(forward, BEGIN_TOKEN, before)),
            Window(tokens[1], *self._targets(backward, END_TOKEN, before)),
        )
        return WindowPair(_type_ids(types), *windows, start)

    def _read(self, rows: Sequence[list[str]], seed: Sequence[int]) -> Sequence[Sequence[str]]:
        """What is read of each stream: all but the last token, which is only predicted."""
        read = [row[:-1] for row in rows]
        return with_typos(read, self.typos, seed) if self.typos else read

    @property
    def _shares(self) -> range:
        """The first step of the text that counts in each stream."""
        return range(0, self.n_streams * self.length, self.length)

    def _targets(
        self, rows: Sequence[list[str]], begin: str, before: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Each row's classes, and which count: what begins a sentence doesn't, nor what lies before a row's share."""
        try:
            targets = [[self.vocabulary.target(token) for token in row[1:]] for row in rows]
        except CorpusError as error:
            raise CorpusError(f"{self.corpus.path}: {error}") from error
        counted = [
            [token != begin and step >= first for step, token in enumerate(row[1:])]
            for row, first in zip(rows, before, strict=True)
        ]
        return np.array(targets, np.int64).T, np.array(counted, np.bool_).T


def _type_ids(types: Iterable[str]) -> CharacterIds:
    return np.stack([_cached_ids(token) for token in types])


_cached_ids = lru_cache(_CACHED_WORDS)(token_ids)
