"""The contract between an engine and what drives it: sentences join, advance together, and end in results.

An engine may be recurrent and keep a state a sentence, or compute whole sentences and keep none. Nothing here knows how
it computes. Cheap to import: no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:  # both load much, and annotations alone need them
    import numpy as np
    from numpy.typing import NDArray

    from bilm_model.scalar_mix import Selection

DataType = Literal["float32", "float16", "bfloat16"]

State = Any
"""What a sentence continues from; only the engine that returned it and its codec know what it holds."""


@dataclass(frozen=True)
class Capacity:
    """What sentences in flight take up, or may.

    Attributes:
        rows: Sentences.
        steps: Tokens and boundaries, all of a sentence's from its joining to its end.
    """

    rows: int
    steps: int

    def __add__(self, other: "Capacity") -> "Capacity":
        return Capacity(self.rows + other.rows, self.steps + other.steps)

    def __sub__(self, other: "Capacity") -> "Capacity":
        return Capacity(self.rows - other.rows, self.steps - other.steps)

    def fits(self, other: "Capacity") -> bool:
        """Return whether the other one fits into this one."""
        return other.rows <= self.rows and other.steps <= self.steps


@dataclass(frozen=True)
class OutputSpec:
    """What to return for a sentence.

    Attributes:
        selection: Layers, pooling and normalisation.
        data_type: Number format of the vectors.
    """

    selection: "Selection"
    data_type: DataType = "float32"

    @property
    def pooled(self) -> bool:
        """Whether tokens are pooled: to one vector a sentence, or a span."""
        return self.selection.pooling != "none"


@dataclass(frozen=True, eq=False, slots=True)
class TokenChoice:
    """Which tokens of a sentence come back; without it, all of them do.

    Attributes:
        rows: (N,) int64, at least one: their indices in the order in which they come back, the same one several times
            where that is asked for; with spans, those of one span behind those of another.
        span_lengths: (n,) int64, each at least 1 and N together: how many of them each span has, which are pooled to
            one vector; None: there are no spans.
    """

    rows: "NDArray[np.int64]"
    span_lengths: "NDArray[np.int64] | None" = None


class Span(Protocol):
    """A range of a sentence's tokens or bytes, half-open."""

    @property
    def start(self) -> int:
        """The first one."""

    @property
    def end(self) -> int:
        """After the last one."""


def row_count(n_tokens: int, output: OutputSpec, choice: TokenChoice | None) -> int | None:
    """Return the length of the token axis of a sentence's vectors; None: they have none."""
    if choice is not None and choice.span_lengths is not None:
        return len(choice.span_lengths)
    if output.pooled:
        return None
    return n_tokens if choice is None else len(choice.rows)


class EngineSentence(Protocol):
    """A sentence as an engine sees it; compared and hashed by identity."""

    @property
    def tokens(self) -> Sequence[str]:
        """Its tokens, none empty, without boundaries."""

    @property
    def output(self) -> OutputSpec:
        """What to return."""

    @property
    def choice(self) -> TokenChoice | None:
        """For which of its tokens, all of which it has; None: for all. Spans need an output that is pooled."""

    @property
    def state(self) -> State | None:
        """What to continue from; None: the zero state."""

    @property
    def return_state(self) -> bool:
        """Whether to return the state after it."""

    @property
    def deferrable(self) -> bool:
        """Whether `advance` may leave it out."""


S = TypeVar("S", bound=EngineSentence)


@dataclass(eq=False, slots=True)
class EngineResult(Generic[S]):
    """What came of a sentence.

    Attributes:
        sentence: The object that joined.
        vectors: [layers if all are selected] [tokens unless pooled, or spans] width, on the host, little-endian, in the
            format asked for; bfloat16, which numpy lacks, as int16 of its bits. Results of one `advance` may share
            memory.
        state: After the sentence, where it was asked for and the engine has states.
    """

    sentence: S
    vectors: "NDArray[np.generic]"
    state: State | None


class StateCodec(Protocol):
    """States as bytes that callers keep and bring back."""

    @property
    def n_bytes(self) -> int:
        """Length of an encoded state."""

    def encode(self, state: State) -> bytes:
        """Return a state as bytes."""

    def decode(self, data: bytes) -> State:
        """Return the state that was encoded.

        Raises:
            StateError: If this model can't have written it.
        """


@dataclass
class CacheStats:
    """Counters of a cache.

    Attributes:
        hits: Tokens that were in the table when their sentence entered, or earlier in the same sentence.
        misses: Tokens that were not, and are computed.
    """

    hits: int = 0
    misses: int = 0


@dataclass
class EngineStats:
    """Counters since the start. They never decrease; self-checks and warm-ups don't count.

    Attributes:
        cache: Of token vectors.
        ticks: Time steps of all rounds.
        steps: That sentences have been advanced by, boundaries included.
    """

    cache: CacheStats = field(default_factory=CacheStats)
    ticks: int = 0
    steps: int = 0


@dataclass(frozen=True)
class EngineDescription:
    """What computes, for people and metrics.

    Attributes:
        backend: Device and implementation.
        device: Name of the device, as torch has it.
        paths: Which of several implementations each part runs on; keys and values are the metric's labels.
    """

    backend: str
    device: str
    paths: Mapping[str, str]


class Engine(Protocol[S]):
    """Compute sentences, many at a time; used by one thread.

    After an error in `advance`, what is in flight is undefined until it has been dropped or reset.
    """

    @property
    def capacity(self) -> Capacity:
        """What may be in flight."""

    @property
    def ahead(self) -> int:
        """Sentences that may join beyond the rows of `capacity`, so that a row that ends one can begin the next."""

    @property
    def max_steps(self) -> int:
        """Steps of the longest sentence that can be computed."""

    @property
    def state_codec(self) -> StateCodec | None:
        """For the states of its sentences; None: an engine without states."""

    @property
    def in_flight(self) -> int:
        """Sentences that have joined and whose results have not been returned."""

    @property
    def used(self) -> Capacity:
        """What of the capacity they take up."""

    @property
    def stats(self) -> EngineStats:
        """Counters; may be read by any thread."""

    @property
    def description(self) -> EngineDescription:
        """What computes; may be read by any thread."""

    def need(self, n_tokens: int) -> Capacity:
        """Return what a sentence of so many tokens takes up; pure, may be called by any thread."""

    def join(self, sentences: Sequence[S]) -> None:
        """Take sentences in, in the scheduler's order.

        They fit the capacity that is free; of rows there are `ahead` more.

        Raises:
            CharacterError: If a token can't be read.
            ValueError: If a sentence doesn't fit, or its state has another shape. After this or any other error none of
                these sentences has joined.
        """

    def drop(self, sentences: Iterable[S]) -> None:
        """Take sentences out before the next `advance`; those that are not in flight are ignored."""

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> Sequence[EngineResult[S]]:
        """Do one bounded slice of work and return the results of all sentences that ended in it.

        Args:
            leave_out: Leave deferrable sentences out as long as others can be computed; what is left out stays as it
                is.
            max_steps: Bound of the slice: steps of all sentences together, though one of each sentence whatever it
                says. None: only the engine's own bound.
        """

    def reset(self) -> None:
        """Drop everything in flight."""

    def warm_up(self) -> None:
        """Reset, and compute a known sentence, so that no later one pays for what is done once.

        To be called first in the thread that will use the engine, and after a failure to find out whether it still
        works.

        Raises:
            ModelError: If the vectors are not finite numbers, or differ from the first warm-up's beyond rounding.
        """

    def check(self) -> None:
        """Compute a sentence of known vectors while nothing is in flight.

        Raises:
            ModelError: If they differ from those of the first warm-up beyond rounding.
        """
