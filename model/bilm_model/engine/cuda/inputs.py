"""The first layer's input projections on a GPU. They depend on the token alone: each different one is computed once.

Legend: N steps of the round, U different tokens, E entries, P projection, C cells.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bilm_model.engine.planner import Indices
from bilm_model.engine.token_table import InputPlaces
from bilm_model.errors import ConfigError

Pair = tuple[Tensor, Tensor]
"""Of the two directions."""


class FirstInputs(Protocol):
    """Where the first layer's input projections come from."""

    projections: Tensor
    """(any, 4·C)"""

    def plan(self, entries: Indices) -> tuple[Indices, Indices]:
        """Look at the entries (2, N) of a round; return the rows (2, N) of `projections` and what `fill` is to get."""

    def fill(self, words: Tensor) -> None:
        """Compute what is missing, from what `plan` has given, on the device."""

    def forget(self, entries: Indices) -> None:
        """These entries will stand for other tokens."""


class RoundInputs:
    """Computed anew in each round."""

    def __init__(self, weights: Pair, biases: Pair, vectors: Tensor, projections: Tensor) -> None:
        """Weights (P, 4·C), biases (4·C,), vectors (E, P); projections (2·N, 4·C) are written to."""
        self._weights, self._biases, self._vectors, self.projections = weights, biases, vectors, projections
        self._rank_of = np.zeros(len(vectors), dtype=np.int64)
        self._sizes = (0, 0)

    def plan(self, entries: Indices) -> tuple[Indices, Indices]:
        """See `FirstInputs`."""
        forward, backward = (distinct(part, self._rank_of) for part in entries)
        self._sizes = (len(forward[0]), len(backward[0]))
        return np.stack([forward[1], self._sizes[0] + backward[1]]), np.concatenate([forward[0], backward[0]])

    def fill(self, words: Tensor) -> None:
        """See `FirstInputs`."""
        x, outs = self.vectors_of(words), self.projections[: len(words)]
        for d, (part, out) in enumerate(zip(x.split(self._sizes), outs.split(self._sizes), strict=True)):
            self.multiply(d, part, out)

    def forget(self, entries: Indices) -> None:
        """See `FirstInputs`."""

    @property
    def n_entries(self) -> int:
        """Of the table of tokens."""
        return len(self._vectors)

    def vectors_of(self, entries: Tensor) -> Tensor:
        """Return the vectors (U, P) of entries (U,), in the product's format."""
        return self._vectors.index_select(0, entries).to(self.projections.dtype)

    def multiply(self, direction: int, x: Tensor, out: Tensor) -> None:
        """X (U, P) -> out (U, 4·C)."""
        multiply_inputs(x, self._weights[direction], self._biases[direction], out)


class CachedInputs:
    """Keep those of the most recently used tokens, in a table that the cells' kernel reads by the same column."""

    def __init__(self, inputs: RoundInputs, n_bytes: int) -> None:
        """Compute them by `inputs`, whose projections it overwrites.

        Raises:
            ConfigError: if so many bytes aren't enough for a round.
        """
        self._inputs, n_entries = inputs, inputs.n_entries
        n_round, n_gates = inputs.projections.shape
        entry_bytes = 2 * n_gates * inputs.projections.element_size()
        self._n_places = min(n_bytes // entry_bytes, n_entries)
        needed = min(n_round, n_entries)
        if self._n_places < needed:
            mib = -(-needed * entry_bytes // 2**20)
            raise ConfigError(f"input_cache_mib: expected 0 or at least {mib} for this model, found {n_bytes // 2**20}")
        self._places = InputPlaces(n_entries, self._n_places)
        self.projections = inputs.projections.new_empty(2 * self._n_places, n_gates)

    def plan(self, entries: Indices) -> tuple[Indices, Indices]:
        """See `FirstInputs`."""
        missing, places = self._places.take(entries)
        first_row = np.array([[0], [self._n_places]])
        return first_row + self._places.places(entries), np.concatenate([missing, places])

    def fill(self, words: Tensor) -> None:
        """See `FirstInputs`."""
        if len(words) == 0:
            return
        missing, places = words.chunk(2)
        x, out = self._inputs.vectors_of(missing), self._inputs.projections[: len(missing)]
        for d in range(2):
            self._inputs.multiply(d, x, out)
            self.projections.index_copy_(0, places + d * self._n_places, out)

    def forget(self, entries: Indices) -> None:
        """See `FirstInputs`."""
        self._places.forget(entries)


def multiply_inputs(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """X (U, P) in the weight's format -> out (U, 4·C).

    One direction at a time: cuBLAS adds a bias on the way out in a plain product only; in a batched one torch would
    write the bias and read it back, a third more of the memory's traffic than what the product itself needs.
    """
    torch.addmm(bias, x, weight, out=out)


def distinct(entries: Indices, scratch: Indices) -> tuple[Indices, Indices]:
    """Return the different ones of entries (N,), and for each its place among them; as `np.unique`, six times as fast.

    Args:
        entries: below E.
        scratch: (E,) whatever it holds.
    """
    order = np.arange(len(entries))
    scratch[entries] = order  # the last one of each remains
    different = entries[scratch[entries] == order]
    scratch[different] = order[: len(different)]
    return different, scratch[entries]
