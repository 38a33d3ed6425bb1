"""Two engines without a network: one recurrent, one that computes whole sentences and has no state.

Their vectors are sums over the bytes of tokens, so a test can tell what was computed from what.
"""

from collections.abc import Iterable, Sequence
from typing import Generic

import numpy as np
from bilm_model.engine.types import (
    Capacity,
    EngineDescription,
    EngineResult,
    EngineSentence,
    EngineStats,
    S,
    State,
    StateCodec,
)
from bilm_model.errors import CharacterError, StateError
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

_WIDTH = 2


def token_value(token: str) -> float:
    """Return the number that stands for a token.

    Raises:
        CharacterError: The token is empty.
    """
    if not token:
        raise CharacterError("the token is empty")
    return float(sum(token.encode()))


class SumCodec:
    """A state is the sum so far, as eight bytes (`StateCodec`)."""

    n_bytes = 8

    def encode(self, state: State) -> bytes:
        """Return a sum as bytes."""
        return np.array(state, "<f8").tobytes()

    def decode(self, data: bytes) -> State:
        """Return the sum.

        Raises:
            StateError: The length is another one.
        """
        if len(data) != self.n_bytes:
            raise StateError(f"the state has {len(data)} bytes, expected {self.n_bytes}")
        return float(np.frombuffer(data, "<f8")[0])


class _ToyEngine(Generic[S]):
    """What both have in common: sentences in flight, and their capacity."""

    ahead = 0

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.stats = EngineStats()
        self._running: dict[S, Vectors] = {}

    @property
    def max_steps(self) -> int:
        """Steps of the longest sentence that can be computed."""
        return self.capacity.steps

    @property
    def state_codec(self) -> StateCodec | None:
        """None: no states."""
        return None

    @property
    def in_flight(self) -> int:
        """Sentences that have joined and not ended."""
        return len(self._running)

    @property
    def used(self) -> Capacity:
        """What they take up."""
        return sum((self.need(len(sentence.tokens)) for sentence in self._running), Capacity(0, 0))

    @property
    def description(self) -> EngineDescription:
        """Return what it is."""
        return EngineDescription(type(self).__name__, "cpu", {"products": "none"})

    def need(self, n_tokens: int) -> Capacity:
        """Return a row and a step for each token."""
        return Capacity(1 if n_tokens else 0, n_tokens)

    def join(self, sentences: Sequence[S]) -> None:
        """Take all of them in or, after an error, none."""
        need = sum((self.need(len(sentence.tokens)) for sentence in sentences), Capacity(0, 0))
        if not (self.capacity - self.used).fits(need):
            raise ValueError(f"{need} doesn't fit")
        self._running.update([(sentence, self._begun(sentence)) for sentence in sentences])

    def drop(self, sentences: Iterable[S]) -> None:
        """Take sentences out."""
        for sentence in sentences:
            self._running.pop(sentence, None)

    def reset(self) -> None:
        """Drop everything."""
        self._running.clear()

    def warm_up(self) -> None:
        """Reset; there is nothing to warm up."""
        self.reset()

    def check(self) -> None:
        """Find nothing wrong."""

    def _advancing(self, leave_out: bool) -> list[S]:
        """Return the sentences that a slice of work is for."""
        urgent = [sentence for sentence in self._running if not sentence.deferrable]
        return urgent if leave_out and urgent else list(self._running)

    def _begun(self, sentence: EngineSentence) -> Vectors:
        """(T, D) of a sentence that joins."""
        values = np.array([token_value(token) for token in sentence.tokens], np.float32)
        return np.repeat(values[:, None], _WIDTH, axis=1)

    def _result(self, sentence: S, state: State | None) -> EngineResult[S]:
        vectors = self._running.pop(sentence)
        if sentence.output.pooled:
            vectors = vectors.mean(axis=0)
        return EngineResult(sentence, vectors.astype("<f2" if sentence.output.data_type == "float16" else "<f4"), state)


class SumEngine(_ToyEngine[S]):
    """Recurrent: a token's vector is the sum of the tokens up to it; `advance` makes one step of every sentence."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self._done: dict[S, int] = {}

    @property
    def state_codec(self) -> StateCodec:
        """Of sums."""
        return SumCodec()

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[S]]:
        """Make one step of every sentence; return those that have no more to make."""
        self._done = {sentence: self._done.get(sentence, 0) for sentence in self._running}
        for sentence in self._advancing(leave_out):
            done = self._done[sentence]
            if done < len(sentence.tokens):
                self._running[sentence][done] += self._sum(sentence, done)
                self._done[sentence] += 1
                self.stats.steps += 1
        self.stats.ticks += 1
        ended = [sentence for sentence, done in self._done.items() if done == len(sentence.tokens)]
        return [self._ended(sentence) for sentence in ended]

    def _sum(self, sentence: S, n_tokens: int) -> float:
        """Return the state after so many tokens."""
        return float(self._running[sentence][n_tokens - 1, 0]) if n_tokens else (sentence.state or 0.0)

    def _ended(self, sentence: S) -> EngineResult[S]:
        done = self._done.pop(sentence)
        return self._result(sentence, self._sum(sentence, done) if sentence.return_state else None)


class WholeEngine(_ToyEngine[S]):
    """Not recurrent: a token's vector is its share of the whole sentence, and costs grow with the square of the length.

    Each `advance` computes the sentence that joined first.
    """

    def need(self, n_tokens: int) -> Capacity:
        """Return a row, and a step for each pair of tokens."""
        return Capacity(1 if n_tokens else 0, n_tokens**2)

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[S]]:
        """Compute the next sentence and return it."""
        if not self._running:
            return []
        sentence = self._advancing(leave_out)[0]
        self._running[sentence] /= max(float(self._running[sentence][:, 0].sum()), 1.0)
        self.stats.steps += len(sentence.tokens)
        return [self._result(sentence, None)]
