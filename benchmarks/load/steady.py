"""An engine kept full, as a busy server keeps it. Loads no engine: it drives any, of any source tree."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilm_model.engine.types import Engine, OutputSpec, State

_BOUNDARIES = 2


@dataclass(eq=False, slots=True)
class LoadSentence:
    """A sentence for an engine (`EngineSentence`).

    Attributes:
        tokens: None empty, without boundaries.
        output: What the engine returns for it.
        state: What to continue from; None: the zero state.
        return_state: Whether to return the state after it.
        deferrable: Whether a round may leave it out.
        choice: Of its tokens; None: all come back.
    """

    tokens: Sequence[str]
    output: "OutputSpec"
    state: "State | None" = None
    return_state: bool = False
    deferrable: bool = False
    choice: None = None


@dataclass(frozen=True)
class Work:
    """What was done in a while.

    Attributes:
        steps: of a sentence by a token or boundary, through every cell.
        ticks: of all sentences in flight.
        rounds: of the engine, between which sentences join.
        seconds: it took.
        tokens_per_step: without boundaries.
        cpu_s: processor time of `join` and `advance` in the thread that drives the engine.
        join_cpu_s: what of it `join` took.
        joined: sentences that joined.
    """

    steps: int
    ticks: int
    rounds: int
    seconds: float
    tokens_per_step: float
    cpu_s: float = 0.0
    join_cpu_s: float = 0.0
    joined: int = 0

    @property
    def tokens_per_s(self) -> float:
        """As a user counts."""
        return self.steps * self.tokens_per_step / self.seconds

    @property
    def steps_per_s(self) -> float:
        """As the cells count."""
        return self.steps / self.seconds

    @property
    def steps_per_cpu_s(self) -> float:
        """Steps by the driving thread's processor time."""
        return self.steps / self.cpu_s

    @property
    def join_us(self) -> float:
        """Processor time of a sentence's joining."""
        return 1e6 * self.join_cpu_s / self.joined


class SteadyLoad:
    """Sentences in turn, without end: one that ends makes room for the next.

    They stay in flight between measurements, so that none pays for filling the rows or for the last sentences of a
    run; the engine's own count of steps says what was done.

    Args:
        engine: nobody else uses it meanwhile.
        sentences: each joins in turn.
        in_flight: at most so many, if the engine takes them; None: as many as it takes.
        output: what the engine returns for each.
    """

    def __init__(
        self,
        engine: "Engine[LoadSentence]",
        sentences: Sequence[Sequence[str]],
        in_flight: int | None,
        output: "OutputSpec",
    ) -> None:
        self._engine, self._output = engine, output
        self._ahead = getattr(engine, "ahead", 0)  # which engines of before have not
        self._in_flight = engine.capacity.rows + self._ahead if in_flight is None else in_flight
        self._tokens: Iterator[tuple[str, ...]] = cycle([tuple(tokens) for tokens in sentences])
        self._waiting = LoadSentence(next(self._tokens), output)
        self._joined, self._join_cpu_s, self._advance_cpu_s = 0, 0.0, 0.0
        n_tokens = sum(map(len, sentences))
        self._tokens_per_step = n_tokens / (n_tokens + _BOUNDARIES * len(sentences))

    def measure(self, seconds: float) -> Work:
        """Work for about so long."""
        self._round()  # fills the rows, and wakes the cores up
        self._joined, self._join_cpu_s, self._advance_cpu_s = 0, 0.0, 0.0
        stats, rounds = self._engine.stats, 0
        steps, ticks, begun_s = stats.steps, stats.ticks, time.perf_counter()
        while (took_s := time.perf_counter() - begun_s) < seconds:
            self._round()
            rounds += 1
        return Work(
            steps=stats.steps - steps,
            ticks=stats.ticks - ticks,
            rounds=rounds,
            seconds=took_s,
            tokens_per_step=self._tokens_per_step,
            cpu_s=self._join_cpu_s + self._advance_cpu_s,
            join_cpu_s=self._join_cpu_s,
            joined=self._joined,
        )

    def _round(self) -> None:
        joining = self._joining()
        begun_s = time.thread_time()
        if joining:
            self._engine.join(joining)
        joined_s = time.thread_time()
        self._engine.advance()
        self._joined += len(joining)
        self._join_cpu_s += joined_s - begun_s
        self._advance_cpu_s += time.thread_time() - joined_s

    def _joining(self) -> list[LoadSentence]:
        """Take sentences in turn as long as they fit."""
        engine, joining = self._engine, list[LoadSentence]()
        free = engine.capacity - engine.used
        free = replace(free, rows=free.rows + self._ahead)
        n_free, need = self._in_flight - engine.in_flight, engine.need(len(self._waiting.tokens))
        while len(joining) < n_free and free.fits(need):
            joining.append(self._waiting)
            free -= need
            self._waiting = LoadSentence(next(self._tokens), self._output)
            need = engine.need(len(self._waiting.tokens))
        return joining
