"""The cache of layer 1's input projections, which depend on the token alone.

Legend: U different tokens, C cells.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilm_model.engine.planner import Indices
from bilm_model.engine.token_table import InputPlaces
from bilm_model.errors import ConfigError

Compute = Callable[[int, Indices], Tensor]
"""A direction's input projections (≥ U, 4·C) of these tokens."""


@dataclass(frozen=True, eq=False)
class InputCache:
    """Layer 1's input projections of the most recently used tokens.

    Attributes:
        projections: (2, places, 4·C).
        places: whose they are.
    """

    projections: Tensor
    places: InputPlaces

    @classmethod
    def of(cls, n_entries: int, n_gates: int, dtype: torch.dtype, n_bytes: int, round_rows: int) -> "InputCache":
        """Allocate a cache.

        Args:
            n_entries: of the table of token vectors.
            n_gates: 4·C.
            dtype: of the projections.
            n_bytes: to use at most.
            round_rows: that one round needs.

        Raises:
            ConfigError: if the bytes aren't enough for one round.
        """
        gate_bytes = n_gates * dtype.itemsize
        n_places = min(n_bytes // (2 * gate_bytes), n_entries)
        needed = min(2 * round_rows, n_entries)
        if n_places < needed:
            mib = -(-needed * 2 * gate_bytes // 2**20)
            raise ConfigError(f"input_cache_mib: expected 0 or at least {mib} for this model, found {n_bytes // 2**20}")
        return cls(torch.empty(2, n_places, n_gates, dtype=dtype), InputPlaces(n_entries, n_places))

    def fill(self, entries: Indices, compute: Compute) -> None:
        """Compute what is missing of these entries."""
        missing, places = self.places.take(entries)
        if len(missing):
            for direction, projections in enumerate(self.projections):
                projections[torch.from_numpy(places)] = compute(direction, missing)[: len(missing)]
