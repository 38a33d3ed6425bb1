"""An engine for tests that fails where it is told to, and a served model on it."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Generic

import numpy as np
import torch
from bilm_model.config import BilmConfig
from bilm_model.engine.types import (
    Capacity,
    Engine,
    EngineDescription,
    EngineResult,
    EngineSentence,
    EngineStats,
    S,
    State,
    StateCodec,
)
from bilm_model.errors import StateError
from bilm_model.tokenization.whitespace import WhitespaceTokenizer
from bilm_server.served_model import ServedModel
from numpy.typing import NDArray

CONFIG = BilmConfig(char_dim=1, filters=((1, 1),), projection_dim=2, cell_dim=2)
"""3 layers of 4 numbers."""

_ITEM_TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}


DEVICE_ASSERT = 710


def device_error(code: int) -> Exception:
    """Return what torch raises for a CUDA error."""
    error = torch.AcceleratorError("CUDA error: as the test wishes")
    error.error_code = code  # type: ignore[attr-defined]
    return error


class CountCodec:
    """States of `FakeEngine`: how many tokens came before, as 8 bytes."""

    n_bytes = 8

    def encode(self, state: State) -> bytes:
        """Return a count as bytes."""
        return int(state).to_bytes(self.n_bytes, "little")

    def decode(self, data: bytes) -> State:
        """Return the count."""
        if len(data) != self.n_bytes:
            raise StateError(f"the state has {len(data)} bytes, expected {self.n_bytes}")
        return int.from_bytes(data, "little")


_CAPACITY, _COUNTS = Capacity(64, 10_000), CountCodec()


class FakeEngine(Generic[S]):
    """`Engine` with a real one's bookkeeping: what joins has to fit, and only what has joined can be dropped.

    A sentence ends after `rounds` rounds, or as many as it has tokens; its vectors hold, for each token, the code of
    its first character, plus the tokens before it if it continues from a state. "poison" fails each round, "unfit"
    can't join, "stuck" can't be dropped. While `broken` isn't 0, everything fails, and each warm-up counts it down.

    Attributes:
        go_on: cleared, it holds the next round.
        computing: set by each round that begins.
        error: what the next round, the next joining and the next check raise, one of them and once.
        groups: sentences of each round.
        bounds: what each round was told of its steps.
        checks: self-checks done.
    """

    def __init__(
        self, capacity: Capacity = _CAPACITY, rounds: int = 0, codec: StateCodec | None = _COUNTS, ahead: int = 0
    ) -> None:
        self.capacity, self.state_codec, self._rounds = capacity, codec, rounds
        self.ahead, self.max_steps = ahead, capacity.steps
        self.stats = EngineStats()
        self.description = EngineDescription("fake", "cpu", {"products": "none"})
        self.broken = 0
        self.error: Exception | None = None
        self.groups: list[int] = []
        self.bounds: list[int | None] = []
        self.checks = 0
        self.go_on, self.computing = threading.Event(), threading.Event()
        self.go_on.set()
        self._remaining: dict[S, int] = {}

    @property
    def used(self) -> Capacity:
        """What is in flight."""
        return sum((self.need(len(sentence.tokens)) for sentence in self._remaining), Capacity(0, 0))

    @property
    def in_flight(self) -> int:
        """Sentences that have joined and not ended."""
        return len(self._remaining)

    def need(self, n_tokens: int) -> Capacity:
        """See `Engine`."""
        return Capacity(1, n_tokens + 2) if n_tokens else Capacity(0, 0)

    def join(self, sentences: Sequence[S]) -> None:
        """See `Engine`."""
        assert not any(sentence in self._remaining for sentence in sentences)
        self._raise_error()
        if any("unfit" in sentence.tokens for sentence in sentences):
            raise MemoryError
        for sentence in sentences:
            self._remaining[sentence] = self._rounds or len(sentence.tokens)
        assert (self.capacity + Capacity(self.ahead, 0)).fits(self.used)

    def drop(self, sentences: Iterable[S]) -> None:
        """See `Engine`."""
        for sentence in sentences:
            if sentence in self._remaining and "stuck" in sentence.tokens:
                raise RuntimeError("it can't leave")
            self._remaining.pop(sentence, None)

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[S]]:
        """See `Engine`."""
        self.computing.set()
        self.go_on.wait()
        self.groups.append(len(self._running(leave_out)))
        self.bounds.append(max_steps)
        self._raise_error()
        running = self._running(leave_out)
        if self.broken or any("poison" in sentence.tokens for sentence in running):
            raise RuntimeError("boom")
        self.stats.steps += len(running)
        self.stats.ticks += 1
        for sentence in running:
            self._remaining[sentence] -= 1
        ended = [sentence for sentence in running if self._remaining[sentence] <= 0]
        for sentence in ended:
            del self._remaining[sentence]
        return [EngineResult(sentence, _vectors(sentence), self._state_after(sentence)) for sentence in ended]

    def reset(self) -> None:
        """See `Engine`."""
        self._remaining.clear()

    def warm_up(self) -> None:
        """See `Engine`."""
        self.reset()
        if self.broken:
            self.broken -= 1
            raise RuntimeError("broken")

    def check(self) -> None:
        """See `Engine`."""
        assert not self._remaining
        self.go_on.wait()
        self.checks += 1
        self._raise_error()
        if self.broken:
            raise RuntimeError("broken while idle")

    def _running(self, leave_out: bool) -> list[S]:
        urgent = [sentence for sentence in self._remaining if not sentence.deferrable]
        return urgent if leave_out and urgent else list(self._remaining)

    def _raise_error(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _state_after(self, sentence: S) -> State | None:
        if self.state_codec is None or not sentence.return_state:
            return None
        return (sentence.state or 0) + len(sentence.tokens)


def _vectors(sentence: EngineSentence) -> NDArray[np.generic]:
    tokens = np.array([ord(token[0]) + (sentence.state or 0) for token in sentence.tokens], dtype="<f4")
    vectors = np.broadcast_to(tokens[:, None], (CONFIG.layer_count, len(tokens), CONFIG.width))
    if sentence.output.selection.layers != "all":
        vectors = vectors[0]
    choice = sentence.choice
    if choice is not None:
        vectors = vectors[..., choice.rows, :]
    if choice is not None and choice.span_lengths is not None:
        spans = np.split(vectors, np.cumsum(choice.span_lengths)[:-1], axis=-2)
        vectors = np.stack([span.mean(axis=-2) for span in spans], axis=-2)
    elif sentence.output.pooled:
        vectors = vectors.mean(axis=-2)
    return vectors.astype(_ITEM_TYPES[sentence.output.data_type])


def fake_model(engine: Engine[Any] | None = None) -> ServedModel:
    """Return a served model named "fake" on an engine, or on a new one."""
    return ServedModel(
        name="fake",
        version="0123456789abcdef",
        config=CONFIG,
        parameter_count=1,
        precision="float32",
        engine=engine or FakeEngine(),
        tokenizer=WhitespaceTokenizer(),
    )
