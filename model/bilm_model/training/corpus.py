"""Plain text becomes streams of words for truncated backpropagation.

A line is a sentence (or a paragraph): "<S>", its words, "</S>". Words are what white space leaves, nothing more is
done to them: no case folding, no Unicode normalisation. A line without words counts too, so that perplexities are per
token with end of line, as usual for WikiText.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bilm_model.characters import BEGIN_TOKEN, END_TOKEN, CharacterIds, character_ids
from bilm_model.errors import ModelError

BOUNDARY = 0
"""The class that ends a sentence: after its last word reading forward, after its first reading backward."""
_UNKNOWN = "<unk>"


class CorpusError(ModelError):
    """Text that can't be trained on or evaluated."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that the softmax knows, most frequent first; class 0 is the sentence boundary.

    Attributes:
        words: by class.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, lines: Sequence[Sequence[str]]) -> "Vocabulary":
        """All words of these lines; equally frequent ones in alphabetical order."""
        counts = Counter(word for line in lines for word in line)
        return cls((END_TOKEN, *sorted(counts, key=lambda word: (-counts[word], word))))

    def classes(self) -> dict[str, int]:
        """The class of each word."""
        return {word: index for index, word in enumerate(self.words)}


@dataclass(frozen=True, eq=False)
class Text:
    """A text as indices.

    Attributes:
        types: (types, 50) character ids of each different token, the boundaries among them.
        tokens: (N,) the type of each token, boundaries included, in reading order.
        classes: (N,) the class of each token for the softmax.
        begins: (N,) whether the token is a "<S>".
    """

    types: CharacterIds
    tokens: NDArray[np.int64]
    classes: NDArray[np.int64]
    begins: NDArray[np.bool_]

    def reversed(self) -> "Text":
        """The text read from its end: there, sentences begin with "</S>"."""
        ends = np.append(self.begins[1:], True)  # a sentence's last token stands before the next one's first
        return Text(self.types, self.tokens[::-1].copy(), self.classes[::-1].copy(), ends[::-1].copy())


def read_lines(path: Path) -> list[list[str]]:
    """The words of each line.

    Raises:
        CorpusError: if the file can't be read, isn't UTF-8 or holds no word.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: {error}") from error
    if not any(lines):
        raise CorpusError(f"{path}: holds no word")
    return lines


def index_text(lines: Sequence[Sequence[str]], vocabulary: Vocabulary) -> Text:
    """Looks every token up.

    A word outside the vocabulary is read by its characters all the same; as a target it counts as "<unk>".

    Raises:
        CorpusError: if a word is unknown to a vocabulary without "<unk>".
    """
    classes = vocabulary.classes()
    sequence = [token for line in lines for token in (BEGIN_TOKEN, *line, END_TOKEN)]
    types = {token: index for index, token in enumerate(dict.fromkeys(sequence))}
    targets = {token: _class_of(token, classes) for token in types}
    return Text(
        types=character_ids(types),
        tokens=np.fromiter((types[token] for token in sequence), np.int64, len(sequence)),
        classes=np.fromiter((targets[token] for token in sequence), np.int64, len(sequence)),
        begins=np.fromiter((token == BEGIN_TOKEN for token in sequence), np.bool_, len(sequence)),
    )


def _class_of(token: str, classes: dict[str, int]) -> int:
    if token in (BEGIN_TOKEN, END_TOKEN):
        return BOUNDARY
    known = classes.get(token, classes.get(_UNKNOWN))
    if known is None:
        raise CorpusError(f"the word {token!r} is not in the vocabulary, which has no {_UNKNOWN}")
    return known


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive steps of several streams.

    Attributes:
        tokens: (steps, batch) types to read.
        targets: (steps, batch) class of the token that follows.
        counted: (steps, batch) whether the target counts; that one sentence follows another is nothing to predict.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    counted: NDArray[np.bool_]


def windows(text: Text, batch: int, steps: int) -> Iterator[Window]:
    """Cuts a text into `batch` streams of equal length and goes through them together, `steps` at a time.

    Each window goes on where the one before it ended. Up to `batch` tokens at the end are left over.

    Raises:
        CorpusError: if the text is too short for so many streams.
    """
    length = (len(text.tokens) - 1) // batch
    if length < 1:
        raise CorpusError(f"{len(text.tokens)} tokens are too few for {batch} streams")

    def streams(values: NDArray[np.int64] | NDArray[np.bool_], shift: int) -> NDArray:  # type: ignore[type-arg]
        return values[shift : shift + batch * length].reshape(batch, length).T

    tokens, targets = streams(text.tokens, 0), streams(text.classes, 1)
    counted = ~streams(text.begins, 1)
    for start in range(0, length, steps):
        part = slice(start, start + steps)
        yield Window(tokens[part], targets[part], counted[part])
