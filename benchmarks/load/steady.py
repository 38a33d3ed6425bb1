"""An engine kept full, as a busy server keeps it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES, BilmConfig
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence

from benchmarks.load.sentences import distinct_words

_BYTES_OF_A_FLOAT = 4
_ROOM = 1.5  # what a cache's bookkeeping may take, and more
_LEAST_INPUT_CACHE_MIB = 64  # the engine takes none that doesn't hold a round's tokens
_BOUNDARIES = 2
_WARM_UP_WORDS = 32  # of a warm-up sentence

Finish = Callable[[EmbeddedSentence], object]


def _keep(embedded: EmbeddedSentence) -> object:
    return embedded


@dataclass(frozen=True)
class Work:
    """What was done in a while.

    Attributes:
        steps: of a sentence by a token or boundary, through every cell.
        ticks: of all sentences in flight.
        rounds: of the engine, between which sentences join.
        seconds: it took.
        tokens_per_step: without boundaries.
    """

    steps: int
    ticks: int
    rounds: int
    seconds: float
    tokens_per_step: float

    @property
    def tokens_per_s(self) -> float:
        """As a user counts."""
        return self.steps * self.tokens_per_step / self.seconds

    @property
    def steps_per_s(self) -> float:
        """As the cells count."""
        return self.steps / self.seconds


class SteadyLoad:
    """Sentences in turn, without end: one that ends makes room for the next.

    They stay in flight between measurements, so that none pays for filling the rows or for the last sentences of a
    run; the engine's own count of steps says what was done.

    Args:
        engine: nobody else uses it meanwhile.
        sentences: each joins in turn.
        in_flight: at most so many, if the engine takes them.
        finish: what is made of each sentence that ends.
    """

    def __init__(
        self, engine: CellularBatch, sentences: Sequence[Sequence[str]], in_flight: int, finish: Finish = _keep
    ) -> None:
        self._engine, self._finish, self._in_flight_at_most = engine, finish, in_flight
        self._next = cycle(as_engine_sentences(sentences))
        self._waiting: PlainSentence = next(self._next)
        self._in_flight = 0
        n_tokens = sum(map(len, sentences))
        self._tokens_per_step = n_tokens / (n_tokens + _BOUNDARIES * len(sentences))

    def measure(self, seconds: float) -> Work:
        """Work for about so long."""
        self._round()  # fills the rows, and wakes the cores up
        stats, rounds = self._engine.stats, 0
        steps, ticks, begun_s = stats.steps, stats.ticks, time.perf_counter()
        while (took_s := time.perf_counter() - begun_s) < seconds:
            self._round()
            rounds += 1
        return Work(stats.steps - steps, stats.ticks - ticks, rounds, took_s, self._tokens_per_step)

    def _round(self) -> None:
        while self._in_flight < self._in_flight_at_most and self._fits():
            self._engine.join(self._waiting)
            self._in_flight += 1
            self._waiting = next(self._next)
        for _, embedded in self._engine.advance():
            self._finish(embedded)
            self._in_flight -= 1

    def _fits(self) -> bool:
        return self._engine.free_rows > 0 and self._engine.free_tokens >= len(self._waiting.tokens) + _BOUNDARIES


def as_engine_sentences(sentences: Sequence[Sequence[str]]) -> list[PlainSentence]:
    """Return sentences as the engine takes them."""
    return [PlainSentence(tuple(tokens)) for tokens in sentences]


def new_engine(size: str, options: EngineOptions) -> CellularBatch:
    """Return an engine on random weights, the same for each size."""
    engine = CellularBatch(random_bilm(SIZES[size]), torch.device("cpu"), options)  # the engine takes the network over
    engine.warm_up()
    return engine


def show_all_words(engine: CellularBatch, sentences: Sequence[Sequence[str]]) -> None:
    """Let an engine's caches see every word."""
    words = distinct_words(sentences)
    parts = [words[first : first + _WARM_UP_WORDS] for first in range(0, len(words), _WARM_UP_WORDS)]
    engine.run(as_engine_sentences(parts))


def token_cache_mib(config: BilmConfig, n_words: int) -> int:
    """Return the size of a cache for the vectors (P) of so many words."""
    return _mib(n_words * config.projection_dim)


def input_cache_mib(config: BilmConfig, n_words: int) -> int:
    """Return the size of a cache for layer 1's input projections (2 directions, 4·C) of so many words."""
    return max(_LEAST_INPUT_CACHE_MIB, _mib(n_words * 2 * 4 * config.cell_dim))


def _mib(n_floats: int) -> int:
    return int(_ROOM * n_floats * _BYTES_OF_A_FLOAT / 2**20) + 1
