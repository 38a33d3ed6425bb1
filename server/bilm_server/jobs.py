"""What is to be computed, for whom, and what came of it; and what computes it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from bilm_model.engine.types import Capacity, OutputSpec, State
from numpy.typing import NDArray

from bilm_server.requests import PreparedSentence, Wanted


@dataclass(eq=False)
class Call:
    """An RPC: the unit of fairness and of cancellation.

    Attributes:
        deadline_s: on the clock of the inference thread, `time.monotonic`.
    """

    deadline_s: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a sentence.

    Attributes:
        vectors: as wanted, in the format of the wire.
        state: after the sentence, where it was asked for.
        queue_s: seconds between its arrival and its joining the engine.
        inference_s: seconds between that and its end.
    """

    vectors: NDArray[np.generic]
    state: State | None
    queue_s: float
    inference_s: float


@dataclass(frozen=True, eq=False)
class Job:
    """A sentence to compute.

    Attributes:
        sentence: what.
        wanted: what of it.
        state: to go on from.
        want_state: whether the state after it is needed.
        call: whose it is.
    """

    sentence: PreparedSentence
    wanted: Wanted
    state: State | None
    want_state: bool
    call: Call

    @property
    def tokens(self) -> tuple[str, ...]:
        """Those of the sentence (`EngineSentence`)."""
        return self.sentence.tokens

    @property
    def output(self) -> OutputSpec:
        """What to return (`EngineSentence`)."""
        return self.wanted.output

    @property
    def return_state(self) -> bool:
        """Whether the state after it is needed (`EngineSentence`)."""
        return self.want_state


@dataclass(frozen=True, eq=False)
class Computed:
    """What a `Compute` gives for one job."""

    vectors: NDArray[np.generic]
    state: State | None


class Compute(Protocol):
    """The model, as this thread drives it."""

    @property
    def room(self) -> Capacity:
        """What may be in flight."""

    @property
    def steps(self) -> int:
        """Steps that sentences have been advanced by since the start; never decreases, and self-checks don't count."""

    def join(self, job: Job) -> None:
        """Takes a job in, for which there is room."""

    def leave(self, job: Job) -> None:
        """Drop a job in flight."""

    def advance(self) -> list[tuple[Job, Computed]]:
        """Moves everything in flight on; returns what has ended."""

    def probe(self) -> None:
        """Drops everything in flight and computes something small; raises if that fails."""

    def check(self) -> None:
        """Computes something small while nothing is in flight; raises if that fails or has changed."""
