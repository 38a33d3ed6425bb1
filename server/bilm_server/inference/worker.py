"""Between the event loop and the engine's own thread: sentences go in, and each one's future ends exactly once."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bilm_model.engine.types import Engine, EngineResult

from bilm_server.errors import RefusalError, internal_error
from bilm_server.inference.exits import (
    Exit,
    PendingSentences,
    Refusal,
    failing,
    late,
    resolve,
    shutting_down,
    too_large,
)
from bilm_server.inference.recovery import Recovery
from bilm_server.inference.scheduler import Scheduler
from bilm_server.inference.speed import Speed
from bilm_server.inference.types import Result, RoundReport, Sentence, Status

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerTiming:
    """How long the worker's thread waits, in seconds.

    Attributes:
        probe_s: until an engine that fails is tried again; a balancer sends nothing that would show that it works.
        idle_check_s: until an engine that computes nothing is checked.
        stop_s: for the thread's end; a round takes a fraction of a second, so a longer one hangs.
    """

    probe_s: float = 1.0
    idle_check_s: float = 5.0
    stop_s: float = 10.0


class InferenceWorker:
    """Run an engine in a thread of its own: a waiting sentence joins the running batch as soon as capacity allows.

    A sentence at fault ends with INTERNAL, the others of its batch with their results, see `Recovery`. Where even a
    probe fails, every sentence ends with MODEL_FAILING until one succeeds again.

    A sentence is in the scheduler, in the engine, among the suspects of a failed round, or has ended. Each way to end
    takes it out of all of them and ends its future.
    """

    def __init__(
        self,
        engine: Engine[Sentence],
        on_round: Callable[[RoundReport], None] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
        timing: WorkerTiming = WorkerTiming(),
    ) -> None:
        """Set the parts; call `start` to start the thread.

        Args:
            engine: what computes.
            on_round: called in the thread after each round; must neither raise nor take long.
            clock: seconds, monotonic; the one of the calls' deadlines.
            timing: how long the thread waits.
        """
        self._engine, self._on_round, self._clock, self._timing = engine, on_round, clock, timing
        self._scheduler: Scheduler[Sentence] = Scheduler(engine.capacity)
        self._recovery = Recovery(engine)
        self._in_flight: dict[Sentence, None] = {}
        self._pending = PendingSentences()
        self._wake = threading.Condition()
        self._stopping = False
        self._healthy = True
        self._heartbeats = 0
        self._warm: asyncio.Future[None] | None = None
        self._checking = False
        self._speed = Speed()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    # ---- for any thread ----

    @property
    def steps_per_s(self) -> float:
        """Recent speed while computing: tokens and boundaries a second; never 0."""
        return self._speed.steps_per_s

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the last thing that the engine computed succeeded."""
        return self._healthy

    @property
    def heartbeats(self) -> int:
        """Grows with everything that the thread gets done."""
        return self._heartbeats

    @property
    def has_work(self) -> bool:
        """Whether there is anything that should make `heartbeats` grow."""
        return bool(self._checking or self._in_flight or self._recovery or self._scheduler)

    @property
    def waiting(self) -> int:
        """Sentences that have not ended and are not being computed."""
        return len(self._scheduler) + self._recovery.n_suspects

    @property
    def in_flight(self) -> int:
        """Sentences being computed."""
        return len(self._in_flight)

    @property
    def pending(self) -> int:
        """Sentences whose futures aren't done."""
        return len(self._pending)

    @property
    def idle(self) -> bool:
        """Whether nothing is left of any sentence."""
        used = self._scheduler.used
        return not (self._pending or self._in_flight or self._recovery or self._scheduler or used.rows or used.steps)

    # ---- on the event loop ----

    async def start(self) -> None:
        """Start the thread and wait until the engine has warmed up; results go to the running event loop.

        Raises:
            Exception: what the engine raised, if it failed.
        """
        self._warm = self._pending.attach().create_future()
        self._thread.start()
        await self._warm

    async def stop(self) -> None:
        """End the thread after the round it is at; what is not done is refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is None:
            self._refuse_all(shutting_down)
        else:
            await asyncio.to_thread(self._thread.join, self._timing.stop_s)
            if self._thread.is_alive():
                _log.error("the inference thread doesn't end; it is left behind")
        self._refuse_pending(shutting_down)

    def submit(self, sentence: Sentence) -> asyncio.Future[Result]:
        """Queue a sentence.

        The future ends in a `Result` or a `RefusalError`. Cancelling it takes the sentence out.
        """
        sentence.arrived_s, sentence.need = self._clock(), self._engine.need(len(sentence.tokens))
        future = self._pending.open(sentence, self._forget)
        with self._wake:
            refusal = self._why_not(sentence)
            if refusal is None:
                self._scheduler.add(sentence, sentence.call, sentence.need, sentence.call.deadline_s)
                self._wake.notify()
            else:
                sentence.status = Status.ENDED
        if refusal is not None:
            resolve([(sentence, refusal)])
        return future

    def refuse_pending(self) -> None:
        """Refuse every sentence because the engine fails; for when the thread can't."""
        self._refuse_pending(failing)

    def _refuse_pending(self, refusal: Refusal) -> None:
        with self._wake:
            self._end(self._scheduler.drain())
        self._pending.refuse(refusal)

    def _forget(self, sentence: Sentence) -> None:
        """Take out a sentence whose future is done; if the thread didn't do that, it may still be waiting."""
        if sentence.status is not Status.WAITING:  # nor will it be again: no need for the lock
            return
        with self._wake:
            if self._scheduler.remove(sentence, sentence.call):
                self._end([sentence])

    def _why_not(self, sentence: Sentence) -> RefusalError | None:
        if self._stopping:
            return shutting_down()
        if not self._healthy:
            return failing()
        return None if self._scheduler.ever_fits(sentence.need) else too_large()

    # ---- in the thread ----

    def _run(self) -> None:
        refusal: Refusal = failing
        try:
            if self._warm_up():
                while self._wait_for_work():
                    self.step()
                refusal = shutting_down
        except Exception:
            _log.critical("the inference thread ends by an error of its own", exc_info=True)
        finally:
            with self._wake:
                self._healthy = False  # whatever comes from now on is refused
            self._refuse_all(refusal)
            # … and what an error of its own left in none of its places
            self._pending.call(lambda: self._refuse_pending(refusal))

    def _warm_up(self) -> bool:
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

    def _wait_for_work(self) -> bool:
        """Wait for work, or until the engine is to be checked without any; return whether to continue."""
        with self._wake:
            timeout_s = self._timing.idle_check_s if self._healthy else self._timing.probe_s
            self._wake.wait_for(lambda: self._stopping or self.has_work, timeout_s)
            return not self._stopping

    def step(self) -> None:
        """Do one bounded piece of work, which the thread does again and again; without work, check the engine."""
        if not self._healthy:
            self._probe()
        elif not self.has_work:
            self._check()
        self._drop_cancelled()
        if self._recovery:
            self._let_suspects_join()
        else:
            self._let_waiting_join()
        self._advance()
        self._heartbeats += 1

    def _drop_cancelled(self) -> None:
        cancelled = [sentence for sentence in self._in_flight if sentence.cancelled]
        if not cancelled:
            return
        try:
            self._engine.drop(cancelled)
        except Exception:
            _log.exception("a sentence can't leave")
            self._recover()
        else:
            self._exit([(sentence, None) for sentence in cancelled])

    def _let_waiting_join(self) -> None:
        now_s = self._clock()
        with self._wake:
            decision = self._scheduler.decide(now_s)
            for sentence in decision.items:
                sentence.status, sentence.joined_s = Status.COMPUTING, now_s
        self._exit([(sentence, late()) for sentence in decision.expired])
        self._join(decision.items)

    def _let_suspects_join(self) -> None:
        """Let one group of suspects join, and nothing else."""
        if not self._in_flight:
            self._join(self._recovery.next_group())

    def _join(self, sentences: Sequence[Sentence]) -> None:
        cancelled = [sentence for sentence in sentences if sentence.cancelled]
        self._exit([(sentence, None) for sentence in cancelled])
        joining = [sentence for sentence in sentences if sentence.status is not Status.ENDED]
        if not joining:
            return
        self._in_flight |= dict.fromkeys(joining)
        try:
            unfit = self._recovery.join(joining)
        except Exception:
            _log.exception("sentences that can't join can't leave either")
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
        begun_s, rows, steps = self._clock(), len(self._in_flight), self._engine.stats.steps
        try:
            found = self._engine.advance()
        except Exception:
            _log.exception("a round of %d sentences failed", rows)
            self._on_round(RoundReport(rows, 0, self._clock() - begun_s, failed=True))
            self._recover()
            return
        now_s = self._clock()
        report = RoundReport(rows, self._engine.stats.steps - steps, now_s - begun_s)
        self._speed.add(report.steps, report.seconds)
        # What joined although the engine said that it didn't has ended already
        ended = [each for each in found if each.sentence in self._in_flight]
        self._exit([(each.sentence, _result(each, now_s)) for each in ended])
        self._on_round(report)

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
        with self._wake:
            self._healthy = healthy
        if not healthy:
            self._refuse_all(failing)
        return healthy

    def _refuse_all(self, refusal: Refusal) -> None:
        suspects = self._recovery.drain()
        with self._wake:
            waiting = self._scheduler.drain()
        self._exit([(sentence, refusal()) for sentence in (*self._in_flight, *suspects, *waiting)])

    def _exit(self, exits: Sequence[tuple[Sentence, Exit]]) -> None:
        """End sentences, the only way out that the thread has: nothing of them is left, and their futures end."""
        if not exits:
            return
        with self._wake:
            self._end(sentence for sentence, _ in exits)
        self._pending.deliver(exits)

    def _end(self, sentences: Iterable[Sentence]) -> None:
        """Take back what sentences hold; with the lock held, once for each."""
        for sentence in sentences:
            if sentence.status is Status.COMPUTING:
                self._in_flight.pop(sentence, None)
                self._scheduler.release(sentence.need)
            sentence.status = Status.ENDED


def _result(found: EngineResult[Sentence], now_s: float) -> Result:
    joined_s = found.sentence.joined_s
    return Result(found.vectors, found.state, joined_s - found.sentence.arrived_s, now_s - joined_s)
