"""Contextual nearest neighbours: whether occurrences of an ambiguous word lie near those of the same sense.

Legend: M candidates, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from bilm_model.bilm import Bilm
from bilm_system.files import read_text, reason

from bilm_training.errors import CorpusError
from bilm_training.evaluation.knowledge.treebank import read_conllu
from bilm_training.evaluation.knowledge.vectors import SentenceEmbedder, Vectors

AMBIGUOUS_WORDS = ("bank", "left", "light", "match", "may", "play", "record", "right", "season", "spring")
"""Each has several senses in WikiText-2's test part or in EWT."""

_SENTENCE_ENDS = {".", "?", "!"}
_HEADING = " = "
_SNIPPET_WORDS = 7

Words = tuple[str, ...]


@dataclass(frozen=True)
class Neighbour:
    """An occurrence near another.

    Attributes:
        cosine: of the two vectors.
        snippet: the words around it, itself between "**".
    """

    cosine: float
    snippet: str


@dataclass(frozen=True)
class Query:
    """An occurrence and those nearest to it.

    Attributes:
        snippet: the words around it, itself between "**".
        neighbours: nearest first, from other sentences only.
    """

    snippet: str
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class WordNeighbours:
    """Some occurrences of a word form.

    Attributes:
        word: as written; case counts.
        occurrences: in the text, repeated sentences counted once.
        queries: evenly spread over them; none if the word doesn't occur.
    """

    word: str
    occurrences: int
    queries: tuple[Query, ...]


def read_sentences(path: Path) -> list[Words]:
    """Return the sentences of a CoNLL-U file (*.conllu), or of tokenised plain text, a paragraph a line as in WikiText.

    A paragraph is cut after ".", "?" and "!" that stand by themselves; headings, lines that begin with " = ", are left
    out.

    Raises:
        CorpusError: if the file can't be read or holds no sentence.
    """
    if path.suffix.lower() == ".conllu":
        return [sentence.words for sentence in read_conllu(path)]
    try:
        paragraphs = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: {reason(error)}") from error
    found = [words for line in paragraphs if not line.startswith(_HEADING) for words in _sentences_of(line.split())]
    if not found:
        raise CorpusError(f"{path}: holds no sentence")
    return found


def _sentences_of(words: Sequence[str]) -> list[Words]:
    ends = [place + 1 for place, word in enumerate(words) if word in _SENTENCE_ENDS]
    cuts = [0, *ends, len(words)]
    return [tuple(words[begin:end]) for begin, end in pairwise(cuts) if begin < end]


def neighbours(
    bilm: Bilm,
    sentences: Sequence[Words],
    words: Sequence[str] = AMBIGUOUS_WORDS,
    *,
    layer: int = 1,
    n_queries: int = 3,
    n_neighbours: int = 3,
    any_word: bool = False,
    device: str = "auto",
) -> tuple[WordNeighbours, ...]:
    """Return the nearest occurrences, by cosine, of some occurrences of each word. Deterministic.

    Args:
        bilm: in float32; left as it is.
        sentences: to search; one that occurs again word for word counts once, or it would be its own neighbour.
        words: to look at, as written.
        layer: whose vectors are compared. Of 120 forms in EWT with several tags the nearest occurrence has the same one
            in 90.0 % with layer 1 of wikitext2-mini, 89.3 % with layer 2, 89.8 % with the mean of all (the word's most
            frequent tag: 72.8 %).
        n_queries: occurrences of each word to look at, evenly spread over the text.
        n_neighbours: of each.
        any_word: whether all words of the text are candidates, rather than other occurrences of the same.
        device: to embed on, see `resolve_device`.

    Raises:
        ModelError: if there is no such device here.
        ValueError: if the biLM has no such layer.
    """
    if not 0 <= layer < bilm.config.layer_count:
        raise ValueError(f"layer: expected 0 to {bilm.config.layer_count - 1}, found {layer}")
    space = _Space.of(bilm, list(dict.fromkeys(sentences)), None if any_word else set(words), layer, device)
    return tuple(space.look_up(word, n_queries, n_neighbours, any_word) for word in words)


@dataclass(frozen=True, eq=False)
class _Space:
    """Candidates and their unit vectors.

    Attributes:
        sentences: of the text.
        places: (M, 2) sentence and position of each candidate.
        vectors: (M, D) of length 1.
    """

    sentences: Sequence[Words]
    places: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    vectors: Vectors

    @classmethod
    def of(cls, bilm: Bilm, sentences: Sequence[Words], only: set[str] | None, layer: int, device: str) -> "_Space":
        if only is not None:
            sentences = [words for words in sentences if not only.isdisjoint(words)]
        places, vectors = [], [np.zeros((0, bilm.config.width), dtype=np.float32)]
        embedded = SentenceEmbedder(bilm, device).each(sentences, "neighbours")
        for row, (words, layers) in enumerate(zip(sentences, embedded, strict=True)):
            columns = [column for column, word in enumerate(words) if only is None or word in only]
            places += [(row, column) for column in columns]
            vectors.append(layers[layer, columns])
        found = np.concatenate(vectors)
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return cls(sentences, np.array(places, dtype=np.int64).reshape(-1, 2), found / np.maximum(lengths, 1e-12))

    def look_up(self, word: str, n_queries: int, n_neighbours: int, any_word: bool) -> WordNeighbours:
        own = np.array([self._word(place) == word for place in self.places.tolist()], dtype=bool).nonzero()[0]
        candidates = np.arange(len(self.places)) if any_word else own
        chosen = own[((np.arange(n_queries) + 0.5) * len(own) / n_queries).astype(int)] if len(own) > n_queries else own
        queries = tuple(self._query(index, candidates, n_neighbours) for index in chosen.tolist())
        return WordNeighbours(word, len(own), queries)

    def _query(self, index: int, candidates: np.ndarray[tuple[int], np.dtype[np.int64]], n_neighbours: int) -> Query:
        others = candidates[self.places[candidates, 0] != self.places[index, 0]]
        cosines = self.vectors[others] @ self.vectors[index]
        nearest = np.argsort(-cosines, kind="stable")[:n_neighbours].tolist()
        found = tuple(Neighbour(float(cosines[n]), self._snippet(self.places[others[n]].tolist())) for n in nearest)
        return Query(self._snippet(self.places[index].tolist()), found)

    def _word(self, place: Sequence[int]) -> str:
        row, column = place
        return self.sentences[row][column]

    def _snippet(self, place: Sequence[int]) -> str:
        row, column = place
        words = self.sentences[row]
        before, after = words[max(0, column - _SNIPPET_WORDS) : column], words[column + 1 : column + 1 + _SNIPPET_WORDS]
        return " ".join((*before, f"**{words[column]}**", *after))
