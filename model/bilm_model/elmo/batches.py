"""Batches of sentences: from tokens to padded ids, and between padded tensors and rows laid end to end.

Legend: B sentences, T tokens of the longest (all of them padded to T), N rows of all sentences, boundaries included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilm_model.alphabet import MAX_CHARACTERS
from bilm_model.characters import character_ids


def batch_to_ids(batch: Sequence[Sequence[str]]) -> Tensor:
    """Return the character ids of sentences, padded with zeros to the longest.

    Args:
        batch: the tokens of each sentence; a sentence may have none.

    Returns:
        int64, (B, T, 50).

    Raises:
        TypeError: A sentence is a string; it would be taken for a list of characters.
        CharacterError: A token is empty or isn't valid Unicode.
    """
    for place, sentence in enumerate(batch):
        if isinstance(sentence, str):
            raise TypeError(f"batch: sentence {place} is the string {sentence[:40]!r} (expected a list of tokens)")
    longest = max(map(len, batch), default=0)
    ids = np.zeros((len(batch), longest, MAX_CHARACTERS), dtype=np.int64)
    for row, sentence in zip(ids, batch, strict=True):
        row[: len(sentence)] = character_ids(sentence)
    return torch.from_numpy(ids)


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Where the tokens of padded sentences are, and where they go with their boundaries.

    Attributes:
        lengths: tokens of each sentence, without the boundaries.
        n_columns: T.
        device: of the tensors.
    """

    lengths: tuple[int, ...]
    n_columns: int
    device: torch.device

    @classmethod
    def of(cls, mask: Tensor, name: str) -> "PaddedBatch":
        """Read a mask (B, T), true where there is a token; `name` is for messages.

        Raises:
            ValueError: A sentence has a token behind padding.
        """
        found = mask.cpu().numpy()
        lengths = found.sum(axis=1)
        holes = np.flatnonzero((found != (np.arange(found.shape[1]) < lengths[:, None])).any(axis=1))
        if len(holes):
            raise ValueError(f"{name}: sentence {holes[0]} has padding before a token (expected padding at the end)")
        return cls(tuple(lengths.tolist()), found.shape[1], mask.device)

    def token_places(self) -> Tensor:
        """Return the place of each token among the B·T of the padded input, sentence after sentence."""
        return self._places(self.lengths, self.n_columns)

    def row_sources(self) -> Tensor:
        """Return for each of the N rows its place in [begin, end, all tokens]."""
        sources = np.ones(sum(self.row_lengths()), dtype=np.int64)
        rows = np.array(self.row_lengths(), dtype=np.int64)
        ends = np.cumsum(rows)
        sources[ends - rows] = 0
        is_token = np.ones(len(sources), dtype=bool)
        is_token[ends - rows] = is_token[ends - 1] = False
        sources[is_token] = 2 + np.arange(sum(self.lengths))
        return self._tensor(sources)

    def row_lengths(self) -> list[int]:
        """Return the rows of each sentence: its tokens and two boundaries."""
        return [n + 2 for n in self.lengths]

    def pad(self, rows: Tensor) -> Tensor:
        """Rows (N, D) -> (B, T + 2, D), with zeros behind each sentence."""
        padded = rows.new_zeros(len(self.lengths) * (self.n_columns + 2), rows.shape[-1])
        places = self._places(self.row_lengths(), self.n_columns + 2)
        return padded.index_copy(0, places, rows).view(len(self.lengths), self.n_columns + 2, rows.shape[-1])

    def mask(self) -> Tensor:
        """Return (B, T + 2), true where there is a token or a boundary."""
        lengths = torch.tensor(self.row_lengths(), dtype=torch.int64, device=self.device)
        return torch.arange(self.n_columns + 2, device=self.device) < lengths[:, None]

    def _places(self, lengths: Sequence[int], n_columns: int) -> Tensor:
        used = np.arange(n_columns) < np.array(lengths, dtype=np.int64).reshape(-1, 1)
        return self._tensor(np.flatnonzero(used))

    def _tensor(self, places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(places).to(self.device)


def without_boundaries(vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Take the boundaries out of sentences.

    Source: `remove_sentence_boundaries` of AllenNLP.

    Args:
        vectors: (B, T + 2, D).
        mask: (B, T + 2), true where there is a token or a boundary.

    Returns:
        (B, T, D), zero where there is no token, and its mask (B, T).
    """
    tokens = mask[:, 2:]  # a sentence's tokens are as many as its rows behind the first two
    return vectors[:, 1:-1] * tokens.unsqueeze(-1), tokens
