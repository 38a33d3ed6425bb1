"""The sentences that an engine computes together: they join, advance, and end."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from bilm_api.constants import Priority
from bilm_model.engine.types import Engine, EngineResult

from bilm_server.errors import internal_error
from bilm_server.inference.exits import Exit, PendingSentences, Refusal, failing, late
from bilm_server.inference.recovery import Recovery
from bilm_server.inference.scheduler import Scheduler
from bilm_server.inference.speed import Speed
from bilm_server.inference.types import Result, RoundReport, Sentence, Status

_log = logging.getLogger(__name__)

BATCH_ROUND_S = 0.010
"""How long a round with batch sentences should take: an interactive one may come at any time, and waits for its end."""


class RunningBatch:
    """Drives an engine; used from the worker's thread only, save its properties, `end` and `look_for_cancelled`.

    A sentence at fault ends with INTERNAL, the others of its batch with their results, see `Recovery`. Where even a
    probe fails, every sentence ends with MODEL_FAILING until one succeeds again.
    """

    def __init__(
        self,
        engine: Engine[Sentence],
        scheduler: Scheduler[Sentence],
        pending: PendingSentences,
        lock: threading.Condition,
        *,
        clock: Callable[[], float],
        on_round: Callable[[RoundReport], None],
    ) -> None:
        """Set the parts.

        Args:
            engine: what computes.
            scheduler: says which sentences join.
            pending: takes what sentences end in.
            lock: of the scheduler and of the sentences' statuses.
            clock: seconds, monotonic; the one of the calls' deadlines.
            on_round: called after each round; must neither raise nor take long.
        """
        self._engine, self._scheduler, self._pending, self._lock = engine, scheduler, pending, lock
        self._clock, self._on_round = clock, on_round
        self._recovery, self._rows = Recovery(engine), engine.capacity.rows
        self._in_flight: dict[Sentence, None] = {}
        self._speed, self._batch_speed = Speed(), Speed()
        self._healthy = True
        self._checking = False
        self._some_cancelled = False

    # ---- for any thread ----

    @property
    def healthy(self) -> bool:
        """Whether the last thing that the engine computed succeeded."""
        return self._healthy

    @property
    def lost(self) -> bool:
        """Whether the device has failed for good."""
        return self._recovery.lost

    @property
    def steps_per_s(self) -> float:
        """Recent speed while computing: tokens and boundaries a second; never 0."""
        return self._speed.steps_per_s

    @property
    def in_flight(self) -> int:
        """Sentences in the engine, those ahead of its rows included."""
        return len(self._in_flight)

    @property
    def n_suspects(self) -> int:
        """Sentences of failed rounds that are to be computed again."""
        return self._recovery.n_suspects

    @property
    def has_work(self) -> bool:
        """Whether there is anything to compute, or a self-check under way."""
        return bool(self._checking or self._in_flight or self._recovery)

    def end(self, sentences: Iterable[Sentence]) -> None:
        """Take back what sentences hold; with the lock held, once for each."""
        for sentence in sentences:
            if sentence.status is Status.COMPUTING:
                self._in_flight.pop(sentence, None)
                self._scheduler.release(sentence.need, sentence.call.priority)
            sentence.status = Status.ENDED

    def look_for_cancelled(self) -> None:
        """Let the next step drop sentences that nothing waits for any more."""
        self._some_cancelled = True

    # ---- in the thread ----

    def step(self) -> None:
        """Do one bounded piece of work; without any, check the engine."""
        if not self._healthy:
            self._probe()
        elif not (self.has_work or self._scheduler):
            self._check()
        self._drop_cancelled()
        if self._recovery:
            self._let_suspects_join()
        else:
            self._let_waiting_join()
        self._advance()

    def _drop_cancelled(self) -> None:
        if not self._some_cancelled:
            return
        self._some_cancelled = False  # before the look: what is cancelled during it is found by the next one
        cancelled = [sentence for sentence in self._in_flight if sentence.cancelled]
        if not cancelled:
            return
        try:
            self._engine.drop(cancelled)
        except Exception as error:
            _log.exception("a sentence can't leave")
            self._recovery.note(error)
            self._recover()
        else:
            self._exit([(sentence, None) for sentence in cancelled])

    def _let_waiting_join(self) -> None:
        now_s = self._clock()
        with self._lock:
            decision = self._scheduler.decide(now_s)
            for sentence in decision.items:
                sentence.status, sentence.joined_s = Status.COMPUTING, now_s
        if decision.expired:
            self._exit([(sentence, late()) for sentence in decision.expired])
        if decision.items:
            self._join(decision.items)

    def _let_suspects_join(self) -> None:
        """Let one group of suspects join, and nothing else."""
        if not self._in_flight:
            self._join(self._recovery.next_group())

    def _join(self, sentences: Sequence[Sentence]) -> None:
        cancelled = [sentence for sentence in sentences if sentence.cancelled]
        if cancelled:
            self._exit([(sentence, None) for sentence in cancelled])
        joining = [sentence for sentence in sentences if sentence.status is not Status.ENDED]
        if not joining:
            return
        self._in_flight |= dict.fromkeys(joining)
        try:
            unfit = self._recovery.join(joining)
        except Exception as error:
            _log.exception("sentences that can't join can't leave either")
            self._recovery.note(error)
            self._recover()
        else:
            self._refuse_unfit(unfit)

    def _refuse_unfit(self, sentences: Sequence[Sentence]) -> None:
        """Refuse sentences that can't join: either they are at fault, or the engine fails.

        With others in flight the next round shows which.
        """
        if not sentences:
            return
        for sentence in sentences:
            del self._in_flight[sentence]
        works = bool(self._in_flight) or self._probe()
        self._exit([(sentence, internal_error() if works else failing()) for sentence in sentences])

    def _advance(self) -> None:
        if not self._in_flight:
            return
        stats = self._engine.stats
        leave_out = self._scheduler.leaves_batch_out()
        with_batch = not leave_out and self._scheduler.rows(Priority.BATCH) > 0
        max_steps = int(self._batch_speed.steps_per_s * BATCH_ROUND_S) if with_batch else None
        begun_s, steps = self._clock(), stats.steps
        rows = self._advancing(leave_out)
        try:
            found = self._engine.advance(leave_out=leave_out, max_steps=max_steps)
        except Exception as error:
            _log.exception("a round of %d sentences failed", rows)
            self._recovery.note(error)
            self._on_round(RoundReport(rows, 0, self._clock() - begun_s, failed=True))
            self._recover()
            return
        now_s = self._clock()
        # What joined although the engine said that it didn't has ended already
        ended = [each for each in found if each.sentence in self._in_flight]
        self._exit([(each.sentence, _result(each, now_s)) for each in ended])
        report = RoundReport(rows, stats.steps - steps, now_s - begun_s)
        self._speed.add(report.steps, report.seconds)
        if with_batch:
            self._batch_speed.add(report.steps, report.seconds)
        self._on_round(report)

    def _advancing(self, leave_out: bool) -> int:
        """Return how many sentences a round advances."""
        most = self._rows  # others have joined ahead of them
        if leave_out:
            most = min(most, self._scheduler.rows(Priority.INTERACTIVE))
        return min(len(self._in_flight), most)

    def _recover(self) -> None:
        """Find out whether the engine still works, and if so which sentence of those in flight it fails at."""
        if not self._probe():
            return
        sentences = list(self._in_flight)
        if len(sentences) == 1:
            self._exit([(sentences[0], internal_error())])
            return
        self._exit([(sentence, None) for sentence in sentences if sentence.cancelled])
        self._recovery.bisect(list(self._in_flight))  # they keep their capacity
        self._in_flight.clear()

    def _check(self) -> None:
        """Check the engine while there is no work: it can fail then, too."""
        self._checking = True  # it can hang, too
        try:
            if not self._recovery.check():
                self._probe()
        finally:
            self._checking = False

    def _probe(self) -> bool:
        """Find out, after a failure, whether the engine works at all; if not, refuse everything."""
        healthy = self._recovery.probe()
        with self._lock:
            self._healthy = healthy
        if not healthy:
            self.refuse_all(failing)
        return healthy

    def close(self, refusal: Refusal) -> None:
        """Refuse everything, also what comes from now on, as `healthy` is False."""
        with self._lock:
            self._healthy = False
        self.refuse_all(refusal)

    def refuse_all(self, refusal: Refusal) -> None:
        """Refuse what waits, what is computed, and what is to be computed again."""
        suspects = self._recovery.drain()
        with self._lock:
            waiting = self._scheduler.drain()
        self._exit([(sentence, refusal()) for sentence in (*self._in_flight, *suspects, *waiting)])

    def _exit(self, exits: Sequence[tuple[Sentence, Exit]]) -> None:
        """End sentences, the only way out that the thread has: nothing of them is left, and their futures end."""
        if not exits:
            return
        with self._lock:
            self.end([sentence for sentence, _ in exits])
        self._pending.deliver(exits)


def _result(found: EngineResult[Sentence], now_s: float) -> Result:
    joined_s = found.sentence.joined_s
    return Result(found.vectors, found.state, joined_s - found.sentence.arrived_s, now_s - joined_s)
