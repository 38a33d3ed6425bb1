"""A text as contiguous streams for truncated backpropagation, in windows of both directions.

Legend: S steps, B streams.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from bilm_model.characters import BEGIN_TOKEN, END_TOKEN, CharacterIds, token_ids
from numpy.typing import NDArray

from bilm_training.data.corpus import Corpus
from bilm_training.data.typos import with_typos
from bilm_training.data.vocabulary import UNKNOWN, Vocabulary
from bilm_training.errors import CorpusError

_CACHED_WORDS = 100_000
_VALID_STEPS = 64
_MAX_VALID_STREAMS, _MIN_STREAM_TOKENS = 16, 1024


@dataclass(frozen=True, eq=False)
class TextWindow:
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
    forward: TextWindow
    backward: TextWindow
    position: int

    @property
    def directions(self) -> tuple[TextWindow, TextWindow]:
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
        """Make sure that every word has a class, before hours of training.

        Raises:
            CorpusError: as `windows`.
        """
        if UNKNOWN not in self.vocabulary.classes:
            for _ in self.windows():
                pass

    def windows(self, first: int = 0, epoch: int = 1) -> Iterator[WindowPair]:
        """Yield the windows in order, each continuing where the one before it ended.

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
            TextWindow(tokens[0], *self._targets(forward, BEGIN_TOKEN, before)),
            TextWindow(tokens[1], *self._targets(backward, END_TOKEN, before)),
        )
        return WindowPair(_type_ids(types), *windows, start)

    def _read(self, rows: Sequence[list[str]], seed: Sequence[int]) -> Sequence[Sequence[str]]:
        """Return what is read of each stream: all but the last token, which is only predicted."""
        read = [row[:-1] for row in rows]
        return with_typos(read, self.typos, seed) if self.typos else read

    @property
    def _shares(self) -> range:
        """The first step of the text that counts in each stream."""
        return range(0, self.n_streams * self.length, self.length)

    def _targets(
        self, rows: Sequence[list[str]], begin: str, before: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return each row's classes, and which count: not what begins a sentence or lies before a row's share."""
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


def valid_streams(corpus: Corpus, vocabulary: Vocabulary) -> Streams:
    """Return a text to measure on, the whole of it: in up to 16 long streams."""
    streams = max(1, min(_MAX_VALID_STREAMS, corpus.n_tokens // _MIN_STREAM_TOKENS))
    return Streams(corpus, vocabulary, streams, _VALID_STEPS, whole=True)
