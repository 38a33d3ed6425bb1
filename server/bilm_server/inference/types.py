"""A sentence from the request to its one exit, and the result that it may end in."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeVar

from bilm_api.constants import Priority
from bilm_model.engine.types import Capacity, OutputSpec, Span, State, TokenChoice, row_count

from bilm_server.errors import RefusalError

if TYPE_CHECKING:  # it is loaded behind the open port
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

NO_DEADLINE_S = float("inf")
_NO_NEED = Capacity(0, 0)
_ALL = slice(None)


@dataclass(eq=False)
class Call:
    """An RPC: the unit of fairness between sentences.

    Attributes:
        deadline_s: on the worker's clock, `time.monotonic`.
        priority: of its sentences.
    """

    deadline_s: float = NO_DEADLINE_S
    priority: Priority = Priority.INTERACTIVE


@dataclass(frozen=True, slots=True)
class AskedTokens:
    """Which tokens of a sentence a request asks for, not checked.

    Attributes:
        rows: their indices; None: it asks for spans.
        spans: ranges.
        unit: what their ends count, "tokens" or "bytes"; anything else is refused.
    """

    rows: Sequence[int] | None = None
    spans: Sequence[Span] = ()
    unit: str = "tokens"


class Status(Enum):
    """Where a sentence is.

    Attributes:
        WAITING: in preprocessing, or in the scheduler.
        COMPUTING: in the engine, or about to be computed again after a failed round; it holds capacity.
        ENDED: nowhere.
    """

    WAITING = auto()
    COMPUTING = auto()
    ENDED = auto()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Result:
    """What was computed for a sentence.

    Attributes:
        vectors: as its output asks for, in the wire's number format.
        state: after the sentence, where it was asked for.
        queue_s: seconds between its arrival and its joining the engine.
        inference_s: seconds between that and its end.
    """

    vectors: "NDArray[np.generic]"
    state: State | None
    queue_s: float
    inference_s: float


Outcome = Result | RefusalError
"""A refusal that a sentence ends in by itself is INTERNAL; every other one ends those submitted with it, too."""

Outcomes = Sequence[Outcome]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sentence:
    """A sentence; it ends exactly once, in a result, a refusal or a cancellation.

    A protocol sets the first six attributes, preprocessing the next ones from them, and the worker the others. The
    status belongs to the holder of the worker's lock. The future belongs to the event loop; once it is done, nothing
    waits for the sentence any more.

    Attributes:
        call: the RPC that it belongs to.
        content: text to tokenise, or tokens; None where the request has neither, and once it is prepared.
        output: what to return for it.
        state_bytes: encoded state to continue from; empty: none, or prepared.
        return_state: whether the state after it is needed.
        asked: for which of its tokens the output is asked for; None: for all, or prepared.
        tokens: to compute, without boundaries.
        starts: byte offsets of the tokens, where the content is text.
        ends: byte offsets after the tokens, where the content is text.
        truncated: whether a token has more bytes than the model reads.
        state: to continue from, for the engine.
        choice: for which of its tokens the output is computed; None: for all.
        status: where it is.
        need: capacity that it takes while it is computed.
        arrived_s: when it was submitted, on the worker's clock.
        joined_s: when it joined the engine, on the worker's clock.
        future: of what it and those that were submitted with it end in; None before it is submitted.
        outcome: what it has ended in; None until the event loop knows, and for a sentence that was cancelled.
    """

    call: Call
    content: str | Sequence[str] | None
    output: OutputSpec
    state_bytes: bytes = b""
    return_state: bool = False
    asked: AskedTokens | None = None
    tokens: Sequence[str] = ()
    starts: Sequence[int] = ()
    ends: Sequence[int] = ()
    truncated: bool = False
    state: State | None = None
    choice: TokenChoice | None = None
    status: Status = Status.WAITING
    need: Capacity = _NO_NEED
    arrived_s: float = 0.0
    joined_s: float = 0.0
    future: "asyncio.Future[Outcomes] | None" = None
    outcome: "Outcome | None" = None

    @property
    def deferrable(self) -> bool:
        """Whether a round may leave it out."""
        return self.call.priority is Priority.BATCH

    @property
    def cancelled(self) -> bool:
        """Whether nothing waits for it any more; for any thread, as it reads one attribute."""
        return self.future is not None and self.future.done()

    @property
    def row_count(self) -> int | None:
        """The length of its vectors' token axis, once it is prepared; None: they have none."""
        return row_count(len(self.tokens), self.output, self.choice)

    def of_rows(self, values: Sequence[T], rows: slice = _ALL) -> Sequence[T]:
        """Return what belongs to a range of rows of something that each token has.

        Where tokens are pooled, all of them belong to the first row.
        """
        if self.output.pooled:
            return () if rows.start else values
        if self.choice is None:
            return values[rows]
        return [values[row] for row in self.choice.rows[rows].tolist()]


@dataclass(slots=True)
class RoundReport:
    """What a round did.

    Attributes:
        rows: sentences that advanced, or would have.
        steps: that they advanced by, together.
        seconds: that it took.
        failed: whether it did.
    """

    rows: int
    steps: int
    seconds: float
    failed: bool = False
