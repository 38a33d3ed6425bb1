"""An engine around another one, which tests hold, watch and let fail."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic

from bilm_model.engine.types import (
    Capacity,
    Engine,
    EngineDescription,
    EngineResult,
    EngineStats,
    S,
    StateCodec,
)


def _do_nothing(*_: Any) -> None:
    """Let the engine continue."""


@dataclass(frozen=True)
class Hooks:
    """What happens before each call of an engine; a hook may wait, or raise what the call shall raise.

    Attributes:
        join: With the sentences that are about to join.
        joined: When they have joined.
        drop: Before sentences are dropped.
        advance: Before each slice of work.
        warm_up: Before a warm-up, which is also the probe after a failure.
    """

    join: Callable[[Sequence[Any]], None] = _do_nothing
    joined: Callable[[], None] = _do_nothing
    drop: Callable[[], None] = _do_nothing
    advance: Callable[[], None] = _do_nothing
    warm_up: Callable[[], None] = _do_nothing


class HookedEngine(Generic[S]):
    """Do what the engine inside does, after the hooks.

    Attributes:
        hooks: What happens before; any thread may replace them.
        present: Sentences that have joined and not left.
    """

    def __init__(self, inner: Engine[S]) -> None:
        """Begin without hooks."""
        self._inner = inner
        self.hooks = Hooks()
        self.present: set[S] = set()

    @contextmanager
    def hooked(self, **hooks: Callable[..., None]) -> Iterator[None]:
        """Have these hooks for a while."""
        before = self.hooks
        self.hooks = replace(before, **hooks)
        yield
        self.hooks = before

    @property
    def capacity(self) -> Capacity:
        return self._inner.capacity

    @property
    def ahead(self) -> int:
        return self._inner.ahead

    @property
    def max_steps(self) -> int:
        return self._inner.max_steps

    @property
    def state_codec(self) -> StateCodec | None:
        return self._inner.state_codec

    @property
    def in_flight(self) -> int:
        return self._inner.in_flight

    @property
    def used(self) -> Capacity:
        return self._inner.used

    @property
    def stats(self) -> EngineStats:
        return self._inner.stats

    @property
    def description(self) -> EngineDescription:
        return self._inner.description

    def need(self, n_tokens: int) -> Capacity:
        return self._inner.need(n_tokens)

    def join(self, sentences: Sequence[S]) -> None:
        self.hooks.join(sentences)
        self._inner.join(sentences)
        self.present.update(sentences)
        self.hooks.joined()

    def drop(self, sentences: Iterable[S]) -> None:
        self.hooks.drop()
        dropped = list(sentences)
        self.present.difference_update(dropped)
        self._inner.drop(dropped)

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> Sequence[EngineResult[S]]:
        self.hooks.advance()
        ended = self._inner.advance(leave_out=leave_out, max_steps=max_steps)
        self.present.difference_update(result.sentence for result in ended)
        return ended

    def reset(self) -> None:
        self.present.clear()
        self._inner.reset()

    def warm_up(self) -> None:
        self.hooks.warm_up()
        self.present.clear()
        self._inner.warm_up()

    def check(self) -> None:
        self._inner.check()
