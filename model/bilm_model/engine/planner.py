"""What one round of the engine does, as index arrays. Pure: no torch.

Legend: R rows (sentences in flight), N steps of all rows of the round, 2 directions (forward, backward).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS_NEVER_IDLE, _IDLE_SHARE = 32, 12

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(eq=False)
class Row:
    """A sentence on its way.

    Attributes:
        slot: where its recurrent state is.
        places: (T,) where the outputs of its tokens and boundaries go.
        done: how many of its T steps it has made.
        brings_state: whether it continues from what its slot holds, rather than starts from the zero state.
    """

    slot: int
    places: Indices
    done: int = 0
    brings_state: bool = False

    @property
    def remaining(self) -> int:
        """Steps that it has still to make."""
        return len(self.places) - self.done


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """Some ticks of all rows: at each tick, every row that has not ended makes one step in both directions.

    Steps are laid out tick after tick. The rows with the most steps come first, so that at each tick the rows that
    still run are the first ones.

    Attributes:
        slots: (R,) of the rows.
        sizes: rows at each tick, never growing, N together.
        places: (2, N) where each step's output goes, which is also whose token it reads.
        last: (R,) for each row the index in N of its last step of the round.
        fresh: (N,) the step is the first of a sentence that starts from the zero state: h = c = 0 are taken instead of
            what its row holds.
    """

    slots: Indices
    sizes: tuple[int, ...]
    places: Indices
    last: Indices
    fresh: Flags

    @classmethod
    def of(cls, rows: Sequence[Row], max_ticks: int) -> "RoundPlan":
        """Plans a round of at most so many ticks for rows that all have steps left."""
        remaining = np.array([row.remaining for row in rows])
        order = np.argsort(-remaining, kind="stable")
        rows = [rows[r] for r in order.tolist()]
        n_steps = np.minimum(remaining[order], max_ticks)
        begins = np.cumsum(n_steps) - n_steps
        ticks = np.arange(n_steps.sum()) - np.repeat(begins, n_steps)
        by_tick = np.argsort(ticks, kind="stable")
        sizes = np.bincount(ticks)
        steps = list(zip(rows, n_steps.tolist(), strict=True))
        forward = np.concatenate([row.places[row.done : row.done + n] for row, n in steps])
        backward = np.concatenate([row.places[::-1][row.done : row.done + n] for row, n in steps])
        starts = np.array([row.done == 0 and not row.brings_state for row in rows])
        return cls(
            slots=np.array([row.slot for row in rows], dtype=np.int64),
            sizes=tuple(sizes.tolist()),
            places=np.stack([forward[by_tick], backward[by_tick]]),
            last=(np.cumsum(sizes) - sizes)[n_steps - 1] + np.arange(len(rows)),
            fresh=((ticks == 0) & np.repeat(starts, n_steps))[by_tick],
        )


def ticks_of_round(remaining: Sequence[int], block_rows: int, max_ticks: int) -> int:
    """Return how many ticks to do together, for rows with so many steps left: many for few rows, few for many.

    The input projections of a round are computed in one block: with few rows it takes many ticks to fill a block, and
    only a full one makes up for reading the weights; with many rows, more ticks would only keep sentences that join
    waiting. A round ends early when rows would have nothing to do, for which others may be waiting; of more than 32
    rows a few may be idle, since a round has its price, too.
    """
    n_ticks = max(1, min(max_ticks, block_rows // len(remaining)))
    n_idle = max(0, len(remaining) - _ROWS_NEVER_IDLE) // _IDLE_SHARE
    return min(n_ticks, sorted(remaining)[n_idle])
