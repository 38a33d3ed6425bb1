"""What the engine asks of a device, and the memory that it keeps there.

Legend: L LSTM layers, 2 directions (forward, backward), S slots, A places, E entries, P projection, C cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bilm_model.characters import CharacterIds
from bilm_model.config import BilmConfig
from bilm_model.engine.planner import Indices, RoundPlan


@dataclass(frozen=True, eq=False)
class Memory:
    """Everything that outlives a round, allocated once.

    Attributes:
        vectors: (E, P) of tokens.
        outputs: (L, 2, A, P) of the LSTM layers.
        h: (L, 2, S, P) recurrent outputs.
        c: (L, 2, S, C) cells.
    """

    vectors: Tensor
    outputs: Tensor
    h: Tensor
    c: Tensor

    @classmethod
    def of(cls, config: BilmConfig, device: torch.device, n_slots: int, n_places: int, n_entries: int) -> "Memory":
        """Allocate; on a CPU the system gives pages only as they are written to."""
        pair = (config.n_layers, 2)
        return cls(
            vectors=torch.empty(n_entries, config.projection_dim, device=device),
            outputs=torch.empty(*pair, n_places, config.projection_dim, device=device),
            h=torch.zeros(*pair, n_slots, config.projection_dim, device=device),
            c=torch.zeros(*pair, n_slots, config.cell_dim, device=device),
        )


class Backend(Protocol):
    """A device that executes rounds."""

    memory: Memory
    block_rows: int
    """Rows that fill a block of input projections."""

    @property
    def name(self) -> str:
        """Device and implementation, for people to read."""

    @property
    def paths(self) -> Mapping[str, str]:
        """Which of several implementations each part runs on; keys and values are the metric's labels."""

    def prepare(self) -> None:
        """Do once what takes long; called in the thread that will compute, while nothing is in flight."""

    def encode(self, entries: Indices, ids: CharacterIds) -> None:
        """Compute token vectors: character ids (N, 50) into `memory.vectors` at different entries (N,)."""

    def forget(self, entries: Indices) -> None:
        """These entries will stand for other tokens."""

    def run(self, plan: RoundPlan, entries: Indices) -> None:
        """Execute a round.

        Args:
            plan: what.
            entries: (2, N) the token that each step reads.
        """
