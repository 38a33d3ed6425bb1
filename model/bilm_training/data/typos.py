"""Typos: one character inserted, deleted or replaced, or two neighbours swapped."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from bilm_model.characters import BEGIN_TOKEN, END_TOKEN

_MARKS = (BEGIN_TOKEN, END_TOKEN, "<unk>")


def is_word(token: str) -> bool:
    """Return whether there is a letter in it; the rest, punctuation, numbers and marks, gets no typos."""
    return token not in _MARKS and any(character.isalpha() for character in token)


def with_typos(sentences: Sequence[Sequence[str]], share: float, seed: int | Sequence[int]) -> list[tuple[str, ...]]:
    """Return the sentences with a typo in a share of their words, drawn at random; the same for the same seed.

    Exactly round(share · words) words of all sentences together get one, which always changes the word. Its kind is
    drawn uniformly from those that apply to the word; letters are drawn as often as they occur in the sentences.

    Raises:
        ValueError: if the share is not in 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share of words with a typo: expected 0 to 1, found {share}")
    rng = np.random.default_rng(seed)
    changed = [list(sentence) for sentence in sentences]
    places = [
        (row, column) for row, tokens in enumerate(changed) for column, token in enumerate(tokens) if is_word(token)
    ]
    typist = _Typist.of(sentences, rng)
    for index in sorted(rng.choice(len(places), round(share * len(places)), replace=False).tolist() if places else []):
        row, column = places[index]
        changed[row][column] = typist.typo(changed[row][column])
    return [tuple(tokens) for tokens in changed]


@dataclass(frozen=True, eq=False)
class _Typist:
    """Makes typos.

    Attributes:
        letters: of the text.
        frequencies: of each.
    """

    letters: tuple[str, ...]
    frequencies: tuple[float, ...]
    rng: np.random.Generator

    @classmethod
    def of(cls, sentences: Sequence[Sequence[str]], rng: np.random.Generator) -> "_Typist":
        counts = Counter(letter for tokens in sentences for token in tokens for letter in token if letter.isalpha())
        letters = tuple(sorted(counts))
        return cls(letters, tuple(counts[letter] / counts.total() for letter in letters), rng)

    def typo(self, word: str) -> str:
        kinds: list[Callable[[str], str]] = [self._insert]
        if len(self.letters) > 1:
            kinds.append(self._replace)
        if len(word) > 1:
            kinds.append(self._delete)
        if len(set(word)) > 1:
            kinds.append(self._swap)
        return kinds[self._below(len(kinds))](word)

    def _insert(self, word: str) -> str:
        place = self._below(len(word) + 1)
        return word[:place] + self._letter() + word[place:]

    def _delete(self, word: str) -> str:
        place = self._below(len(word))
        return word[:place] + word[place + 1 :]

    def _replace(self, word: str) -> str:
        place = self._below(len(word))
        letter = word[place]
        while letter == word[place]:
            letter = self._letter()
        return word[:place] + letter + word[place + 1 :]

    def _swap(self, word: str) -> str:
        unequal = [place for place in range(len(word) - 1) if word[place] != word[place + 1]]
        place = unequal[self._below(len(unequal))]
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    def _below(self, bound: int) -> int:
        return int(self.rng.integers(bound))

    def _letter(self) -> str:
        return str(self.rng.choice(self.letters, p=self.frequencies))
