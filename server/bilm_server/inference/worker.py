"""Between the event loop and an engine: sentences go in, and each one's future ends exactly once."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bilm_api.constants import Priority
from bilm_model.engine.types import Capacity, Engine

from bilm_server.errors import RefusalError
from bilm_server.inference.batch import RunningBatch
from bilm_server.inference.engine_thread import STOP_S, EngineThread
from bilm_server.inference.exits import PendingSentences, Refusal, failing, shutting_down, too_large
from bilm_server.inference.scheduler import Scheduler
from bilm_server.inference.turns import EIGHTH
from bilm_server.inference.types import Outcomes, RoundReport, Sentence, Status

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerTiming:
    """How long the worker waits, in seconds.

    Attributes:
        probe_s: until an engine that fails is tried again; a balancer sends nothing that would show that it works.
        idle_check_s: until an engine that computes nothing is checked.
        stop_s: for the thread to let go of it.
    """

    probe_s: float = 1.0
    idle_check_s: float = 5.0
    stop_s: float = STOP_S


class Worker(Protocol):
    """Computes prepared sentences; used from the event loop."""

    @property
    def steps_per_s(self) -> float:
        """Recent speed while computing: tokens and boundaries a second; never 0."""

    @property
    def healthy(self) -> bool:
        """Whether the last thing that was computed succeeded."""

    @property
    def idle(self) -> bool:
        """Whether nothing is left of any sentence."""

    def submit(self, sentences: Sequence[Sentence]) -> "asyncio.Future[Outcomes]":
        """Queue sentences of one call, one at least.

        The future ends in the outcome of each of them, in their order: a `Result`, or an INTERNAL refusal that is the
        sentence's own. Or it ends in the first other RefusalError. Then, and if it is cancelled, all are taken out.
        """


class InferenceWorker:
    """Run an engine (`Worker`): a waiting sentence joins the running batch as soon as capacity allows.

    A sentence is in the scheduler, in the engine, among the suspects of a failed round, or has ended. Each way to end
    takes it out of all of them and ends its future.

    Attributes:
        thread: in which the engine computes; other workers may take turns in it.
        weight: of its share of the thread's time.
    """

    def __init__(
        self,
        engine: Engine[Sentence],
        on_round: Callable[[RoundReport], None] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
        timing: WorkerTiming = WorkerTiming(),
        batch_share: float = EIGHTH,
        *,
        thread: EngineThread | None = None,
        weight: float = 1.0,
    ) -> None:
        """Set the parts; call `start` to take turns in the thread.

        Args:
            engine: what computes.
            on_round: called in the thread after each round; must neither raise nor take long.
            clock: seconds, monotonic; the one of the calls' deadlines.
            timing: how long it waits.
            batch_share: of turns and rounds that batch sentences get while there are interactive ones.
            thread: in which it computes; None: one of its own.
            weight: of its share of the thread's time.
        """
        self.thread, self.weight = thread or EngineThread(), weight
        self._engine, self._clock, self._timing = engine, clock, timing
        self._scheduler: Scheduler[Sentence] = Scheduler(engine.capacity, engine.ahead, batch_share)
        self._pending = PendingSentences()
        self._wake = self.thread.lock  # the lock of the scheduler and of the sentences' statuses
        self._batch = RunningBatch(engine, self._scheduler, self._pending, self._wake, clock=clock, on_round=on_round)
        self._stopping = False
        self._warm: asyncio.Future[None] | None = None

    # ---- for any thread ----

    @property
    def steps_per_s(self) -> float:
        """Recent speed while computing: tokens and boundaries a second; never 0."""
        return self._batch.steps_per_s

    @property
    def healthy(self) -> bool:
        """Whether the last thing that the engine computed succeeded."""
        return self._batch.healthy

    @property
    def lost(self) -> bool:
        """Whether the device has failed for good: nothing can be computed in this process any more."""
        return self._batch.lost

    @property
    def has_work(self) -> bool:
        """Whether there is anything to compute for a caller, or a self-check under way."""
        return bool(self._batch.has_work or self._scheduler)

    @property
    def check_after_s(self) -> float:
        """Seconds after which an engine without work is checked, or one that fails tried again."""
        return self._timing.idle_check_s if self._batch.healthy else self._timing.probe_s

    @property
    def waiting(self) -> int:
        """Sentences that have not ended and are not being computed."""
        return len(self._scheduler) + self._batch.n_suspects

    @property
    def urgent(self) -> bool:
        """Whether any interactive sentence is among them."""
        scheduler, interactive = self._scheduler, Priority.INTERACTIVE
        return bool(scheduler.rows(interactive) or scheduler.waiting(interactive))

    def waiting_of(self, priority: Priority) -> int:
        """Return how many sentences of a priority have not joined the engine."""
        return self._scheduler.waiting(priority)

    def rows_of(self, priority: Priority) -> int:
        """Return how many rows sentences of a priority hold, those included that rounds leave out."""
        return self._scheduler.rows(priority)

    @property
    def in_flight(self) -> int:
        """Sentences in the engine, those ahead of its rows included."""
        return self._batch.in_flight

    @property
    def rows(self) -> int:
        """Sentences being computed."""
        return min(self.in_flight, self._engine.capacity.rows)

    @property
    def pending(self) -> int:
        """Submissions whose futures aren't done."""
        return len(self._pending)

    @property
    def idle(self) -> bool:
        """Whether nothing is left of any sentence."""
        return not (self._pending or self.waiting or self.in_flight) and self._scheduler.used == Capacity(0, 0)

    # ---- on the event loop ----

    async def start(self) -> None:
        """Take turns in the thread, and wait until the engine has warmed up; results go to the running event loop.

        Raises:
            Exception: what the engine raised, if it failed.
        """
        self._warm = self._pending.attach().create_future()
        self.thread.add(self)
        await self._warm

    async def stop(self) -> None:
        """Take no more turns after the round that is computed; what is not done is refused."""
        with self._wake:
            self._stopping = True
        if self._warm is None:
            self._batch.close(shutting_down)
        elif not await self.thread.remove(self, self._timing.stop_s):
            _log.error("the inference thread doesn't end; it is left behind")
        self._refuse_pending(shutting_down)

    def submit(self, sentences: Sequence[Sentence]) -> asyncio.Future[Outcomes]:
        """Queue sentences of one call, one at least.

        The future ends in the outcome of each of them, in their order: a `Result`, or an INTERNAL refusal that is the
        sentence's own. Or it ends in the first other RefusalError. Then, and if it is cancelled, all are taken out.
        """
        now_s = self._clock()
        for sentence in sentences:
            sentence.arrived_s, sentence.need = now_s, self._engine.need(len(sentence.tokens))
        future = self._pending.open(sentences, self._forget)
        with self._wake:
            refusal = self._why_not(sentences)
            for sentence in sentences:
                if refusal is None:
                    call = sentence.call
                    self._scheduler.add(sentence, call, sentence.need, call.deadline_s, call.priority)
                else:
                    sentence.status = Status.ENDED
            self._wake.notify()
        if refusal is not None:
            future.set_exception(refusal)
        return future

    def refuse_pending(self) -> None:
        """Refuse every sentence because the engine fails; for when the thread can't."""
        self._refuse_pending(failing)

    def _refuse_pending(self, refusal: Refusal) -> None:
        with self._wake:
            self._batch.end(self._scheduler.drain())
        self._pending.refuse(refusal)

    def _forget(self, sentences: Sequence[Sentence]) -> None:
        """Take out sentences whose future is done; where the thread didn't do that, they may be anywhere."""
        if all(sentence.status is Status.ENDED for sentence in sentences):
            return
        with self._wake:
            waiting = [sentence for sentence in sentences if sentence.status is Status.WAITING]
            self._batch.end([sentence for sentence in waiting if self._scheduler.remove(sentence, sentence.call)])
            if any(sentence.status is Status.COMPUTING for sentence in sentences):
                self._batch.look_for_cancelled()

    def _why_not(self, sentences: Sequence[Sentence]) -> RefusalError | None:
        if self._stopping:
            return shutting_down()
        if not self._batch.healthy:
            return failing()
        for sentence in sentences:
            if not self._scheduler.ever_fits(sentence.need, sentence.call.priority):
                return too_large()
        return None

    # ---- in the thread ----

    def begin(self) -> bool:
        """Compute something small for `start`; return whether that succeeded."""
        failure: Exception | None = None
        try:
            self._engine.warm_up()
        except Exception as error:
            failure = error

        def report() -> None:
            if self._warm is None or self._warm.done():  # `start` was cancelled
                return
            if failure is None:
                self._warm.set_result(None)
            else:
                self._warm.set_exception(failure)

        self._pending.call(report)
        return failure is None

    def step(self) -> None:
        """Do one bounded piece of work, which the thread does again and again; without any, check the engine."""
        self._batch.step()

    def end(self, *, failed: bool) -> None:
        """Refuse what is left of all sentences: there will be no further step."""
        refusal: Refusal = failing if failed else shutting_down
        self._batch.close(refusal)
        # … and what an error of its own left in none of its places
        self._pending.call(lambda: self._refuse_pending(refusal))
