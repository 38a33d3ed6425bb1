"""The one thread that computes: the engines of all models take turns in it.

One, and not one for each engine: OpenMP keeps a team of workers for each thread that computes, and teams that wait for
each other sleep where one would spin; and a device does one round at a time anyway.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from bilm_server.inference.turns import EIGHTH, BatchShare, Turns

_log = logging.getLogger(__name__)

STOP_S: Final = 10.0
"""How long the end of a worker is waited for: a round takes a fraction of a second, so a longer one hangs."""


class Driven(Protocol):
    """What takes turns: its methods are called in the thread, its properties with the lock held."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something for a caller."""

    @property
    def urgent(self) -> bool:
        """Whether any of that is interactive."""

    @property
    def lost(self) -> bool:
        """Whether the device has failed for good."""

    @property
    def weight(self) -> float:
        """Of its share of the time."""

    @property
    def check_after_s(self) -> float:
        """Seconds after its last step when it takes one without work."""

    def begin(self) -> bool:
        """Prepare to take turns; return whether it can."""

    def step(self) -> None:
        """Do one bounded piece of work."""

    def end(self, *, failed: bool) -> None:
        """Let go of everything: there will be no further step."""

    def refuse_pending(self) -> None:
        """Refuse every sentence because the engine fails; on the event loop."""


class EngineThread:
    """Runs while anything takes turns; it begins with the first and ends with the last.

    Attributes:
        lock: of everything that the thread shares with the event loop; notify it of new work.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, batch_share: float = EIGHTH) -> None:
        """Set what turns go by.

        Args:
            clock: says when an engine without work is to be checked.
            batch_share: of the turns, for engines with nothing but batch work while others have interactive work.
        """
        self.lock = threading.Condition()
        self._clock = clock
        self._turns: Turns[Driven] = Turns()
        self._batch_share = BatchShare(batch_share)
        self._due_s: dict[Driven, float] = {}  # of all that take turns, in the order in which they came
        self._coming: list[Driven] = []
        self._leaving: dict[Driven, threading.Event] = {}
        self._heartbeats = 0
        self._beginning: Driven | None = None
        self._thread: threading.Thread | None = None

    # ---- for any thread ----

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def lost(self) -> bool:
        """Whether the device has failed for good: nothing can be computed in this process any more."""
        return any(driven.lost for driven in tuple(self._due_s))

    @property
    def heartbeats(self) -> int:
        """Grows with everything that the thread gets done."""
        return self._heartbeats

    @property
    def has_work(self) -> bool:
        """Whether there is anything that should make `heartbeats` grow."""
        return self._beginning is not None or any(driven.has_work for driven in tuple(self._due_s))

    # ---- on the event loop ----

    def add(self, driven: Driven) -> None:
        """Let somebody take turns: `begin` first, then steps."""
        with self.lock:
            self._coming.append(driven)
            if not self.alive:
                self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
                self._thread.start()
            self.lock.notify()

    async def remove(self, driven: Driven, stop_s: float = STOP_S) -> bool:
        """Let somebody take turns no more; return whether the thread has let go of it, after its present step.

        Args:
            driven: what has been added.
            stop_s: how long to wait for that.
        """
        with self.lock:
            if driven not in (*self._due_s, *self._coming, self._beginning):
                return True
            gone = self._leaving.setdefault(driven, threading.Event())
            self.lock.notify()
        return await asyncio.to_thread(gone.wait, stop_s)

    def refuse_pending(self) -> None:
        """Refuse every sentence of every engine; for when the thread can't."""
        for driven in tuple(self._due_s):
            driven.refuse_pending()

    # ---- in the thread ----

    def _run(self) -> None:
        failed = True
        try:
            while (driven := self._next()) is not None:
                self._step(driven)
            failed = False
        except Exception:
            _log.critical("the inference thread ends by an error of its own", exc_info=True)
        finally:
            if failed:
                self._end_all()

    def _next(self) -> Driven | None:
        """Wait for somebody whose turn it is; None: nobody is left, and the thread is over."""
        while True:
            self._let_leave()
            with self.lock:
                if self._coming:
                    coming = self._beginning = self._coming.pop(0)
                elif not self._due_s:
                    self._thread = None  # under the lock: who comes now begins another one
                    return None
                elif self._leaving:
                    continue
                else:
                    if (found := self._whose_turn()) is not None:
                        return found
                    self.lock.wait(max(0.0, min(self._due_s.values()) - self._clock()))
                    continue
            self._let_in(coming)

    def _whose_turn(self) -> Driven | None:
        now_s = self._clock()
        for driven, due_s in self._due_s.items():
            if due_s <= now_s:
                return driven
        ready = [driven for driven in self._due_s if driven.has_work]
        return self._turns.next(self._before_batch(ready)) if ready else None

    def _before_batch(self, ready: list[Driven]) -> list[Driven]:
        """Leave out those that have nothing but batch work while others have more, unless it is batch's turn."""
        urgent = [driven for driven in ready if driven.urgent] if len(ready) > 1 else ready
        if not urgent or len(urgent) == len(ready):
            self._batch_share.forget()
            return ready
        if self._batch_share.due:
            self._batch_share.taken()
            return [driven for driven in ready if driven not in urgent]
        self._batch_share.passed()
        return urgent

    def _step(self, driven: Driven) -> None:
        begun_s = self._clock()
        driven.step()
        now_s = self._clock()
        self._turns.took(driven, now_s - begun_s)
        self._due_s[driven] = now_s + driven.check_after_s
        self._heartbeats += 1

    def _let_in(self, driven: Driven) -> None:
        begun = driven.begin()
        self._heartbeats += 1
        with self.lock:
            self._beginning = None
            if begun:
                self._turns.add(driven, driven.weight)
                self._due_s[driven] = self._clock() + driven.check_after_s
                return
            gone = self._leaving.pop(driven, None)
        driven.end(failed=True)
        if gone is not None:
            gone.set()

    def _let_leave(self) -> None:
        if not self._leaving:
            return
        with self.lock:
            leaving = [driven for driven in self._leaving if driven in self._due_s]
        for driven in leaving:
            driven.end(failed=False)
            self._turns.remove(driven)
            with self.lock:
                del self._due_s[driven]
                self._leaving.pop(driven).set()

    def _end_all(self) -> None:
        with self.lock:
            everybody, leaving = (*self._due_s, *self._coming), tuple(self._leaving.values())
            self._due_s.clear()
            self._coming.clear()
            self._leaving.clear()
        for driven in everybody:
            driven.end(failed=True)
        for gone in leaving:
            gone.set()
