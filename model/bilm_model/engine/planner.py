"""Which sentence takes which lane, and what one round of the engine does, as index arrays. Pure: no torch.

A lane takes the next waiting sentence in the tick after its last one ended, so lanes are idle only while no sentence
waits. All lengths are known, so a round is planned at once, by compiled loops over arrays (`loops`).

Legend: R rows (lanes that run), N steps of all rows of the round, 2 directions (forward, backward).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(eq=False, slots=True)
class RoundPlan:
    """Some ticks of all lanes that run: at each tick, each of them makes one step in both directions.

    Steps are laid out tick after tick. The lanes that run for the most ticks come first, so that at each tick the rows
    that still run are the first ones. A lane may end one sentence and begin the next.

    Attributes:
        slots: (R,) the lane of each row.
        sizes: Rows at each tick, never growing, N together.
        places: (2, N) where each step's output goes, which is also whose token it reads.
        last: (R,) for each row the index in N of its last step of the round.
        fresh: (N,) the step is the first of a sentence that starts from the zero state: h = c = 0 are taken instead of
            what its lane holds.
    """

    slots: Indices
    sizes: tuple[int, ...]
    places: Indices
    last: Indices
    fresh: Flags


@dataclass(eq=False, slots=True)
class Round:
    """A round, and what ends in it.

    Attributes:
        plan: What to execute.
        entries: (2, N) the entry of the token that each step reads.
        brought: Sentences that begin with a state of their own, with their lanes: it is to be written before.
        ended: Sentences that end in the round, with their lanes, which still have the state of those whose state is
            returned.
    """

    plan: RoundPlan
    entries: Indices
    brought: Sequence[tuple[int, int]]
    ended: Sequence[tuple[int, int]]


@dataclass(eq=False, slots=True)
class SentenceSteps:
    """The steps of some sentences, one sentence after another.

    Attributes:
        counts: (n,) of each sentence, boundaries included.
        places: (N,) where the outputs are.
        entries: (N,) of the tokens.
    """

    counts: Indices
    places: Indices
    entries: Indices
