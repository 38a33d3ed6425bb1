"""Watch whether engines make progress: health follows them, and engines that are lost end the process."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from bilm_server.errors import EngineLostError

_log = logging.getLogger(__name__)

_INTERVAL_S = 0.25


class Watched(Protocol):
    """What a watchdog sees of the thread in which the engines compute."""

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""

    @property
    def lost(self) -> bool:
        """Whether the device has failed for good."""

    @property
    def heartbeats(self) -> int:
        """Grows with everything that the thread gets done."""

    @property
    def has_work(self) -> bool:
        """Whether there is anything that should make it grow."""

    def refuse_pending(self) -> None:
        """Refuse every sentence because the engines fail."""


class Watchdog:
    """Watches the engines' thread from the event loop.

    A model that fails is the only one that doesn't work. Where the thread hangs, none does.

    Time is counted in looks, not read from a clock: a process that was stopped for a minute, by a signal or with its
    machine, has not hung for a minute.
    """

    def __init__(
        self,
        watched: Watched,
        models: Callable[[], Mapping[str, bool]],
        hang_s: float,
        give_up_s: float,
        on_health: Callable[[Mapping[str, bool]], None],
    ) -> None:
        """Set what to watch.

        Args:
            watched: what to look at.
            models: returns, by model, whether the last thing that it computed succeeded.
            hang_s: seconds that one thing may take before the thread counts as hung.
            give_up_s: seconds that it may stay hung, or every model go on failing, before the engines count as lost.
            on_health: takes at each look whether each model works, and doesn't wait for anything.
        """
        self._watched, self._models, self._on_health = watched, models, on_health
        self._looks_to_hang = max(1, round(hang_s / _INTERVAL_S))
        self._looks_to_loss = max(1, round(give_up_s / _INTERVAL_S))
        self._heartbeats = -1
        self._still = 0
        self._bad = 0

    @property
    def stalled_s(self) -> float:
        """How long there has been work and nothing got done."""
        return self._still * _INTERVAL_S

    async def run(self) -> None:
        """Watch until it is cancelled.

        Raises:
            EngineLostError: when waiting longer makes no sense.
        """
        while True:
            self.look()
            await asyncio.sleep(_INTERVAL_S)

    def look(self) -> None:
        """Look once; what `run` does again and again.

        Raises:
            EngineLostError: when waiting longer makes no sense.
        """
        hung = self._is_hung()
        moves = self._watched.alive and not hung
        works = {model: healthy and moves for model, healthy in self._models().items()}
        self._bad = 0 if any(works.values()) else self._bad + 1
        self._on_health(works)
        if hung:
            self._watched.refuse_pending()
        if not self._watched.alive:
            raise EngineLostError("the inference thread has ended")
        if self._watched.lost:
            raise EngineLostError("the device has failed for good, so nothing can be computed in this process any more")
        if self._bad > self._looks_to_loss:
            what = "the engine hangs" if hung else "the model fails" if len(works) == 1 else "every model fails"
            raise EngineLostError(f"{what} and hasn't recovered in {self._bad * _INTERVAL_S:g} s")

    def _is_hung(self) -> bool:
        moved = self._watched.heartbeats != self._heartbeats or not self._watched.has_work
        self._heartbeats = self._watched.heartbeats
        self._still = 0 if moved else self._still + 1
        if self._still == self._looks_to_hang:
            _log.error("the engine hangs: nothing got done in %g s", self._still * _INTERVAL_S)
        return self._still >= self._looks_to_hang
