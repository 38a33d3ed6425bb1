"""Glue between the event loop and the model's own thread: sentences go in as jobs, results come back as futures."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from bilm_api.constants import Reason

from bilm_server.errors import RefusalError, internal_error
from bilm_server.jobs import Call, Compute, Computed, Job, Outcome
from bilm_server.scheduler import Scheduler
from bilm_server.speed import Speed

_log = logging.getLogger(__name__)

# How often a model that fails is tried again; a balancer sends nothing that would show that it has recovered.
_PROBE_INTERVAL_S = 1.0
# How often one that nobody asks is.
_IDLE_CHECK_INTERVAL_S = 5.0

# A round takes a fraction of a second; a thread that doesn't end by then hangs.
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        rows: sentences that advanced, or would have.
        steps: that they advanced by, together.
        seconds: that it took.
        failed: whether it did.
    """

    rows: int
    steps: int
    seconds: float
    failed: bool = False


class _Status(Enum):
    """Where a sentence is.

    Attributes:
        WAITING: in the scheduler.
        COMPUTING: in the engine, or about to be computed again after a failed round; it holds capacity.
        ENDED: nowhere.
    """

    WAITING = auto()
    COMPUTING = auto()
    ENDED = auto()


@dataclass(eq=False)
class _Ticket:
    """A sentence from its arrival to its one exit: a result, a refusal, or a cancellation.

    The status belongs to whoever holds the thread's lock. The future belongs to the event loop; once it is done, nobody
    waits for the sentence any more.
    """

    job: Job
    future: asyncio.Future[Outcome]
    arrived_s: float
    joined_s: float = 0.0
    status: _Status = _Status.WAITING

    @property
    def n_steps(self) -> int:
        return self.job.sentence.n_steps

    @property
    def given_up(self) -> bool:
        return self.future.done()  # reads one attribute, which any thread may

    def outcome(self, computed: Computed, now_s: float) -> Outcome:
        return Outcome(computed.vectors, computed.state, self.joined_s - self.arrived_s, now_s - self.joined_s)


_Result = Outcome | RefusalError | None
"""None: the sentence was given up, so that there is nothing to deliver."""

_Refusal = Callable[[], RefusalError]
"""Makes one for each sentence: an exception raised in two places keeps the frames of both."""


class InferenceThread:
    """Run the model in a thread of its own: a waiting sentence joins the running batch as soon as capacity allows.

    A failed round doesn't identify the sentence at fault. So its sentences are computed again from their beginnings, in
    halves and halves of halves, until the one that fails by itself is found: its caller gets INTERNAL, the others their
    results. Where even the probe fails, everybody gets MODEL_FAILING until it succeeds again.

    A sentence is in the scheduler, in the engine, among the suspects of a failed round, or has ended. Each way to end
    takes it out of all of them and ends its future.
    """

    def __init__(
        self,
        compute: Compute,
        on_round: Callable[[Round], None] = lambda round: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Call `start` to start the thread.

        Args:
            compute: the model.
            on_round: called in the thread after each round; must neither raise nor take long.
            clock: seconds, monotonic; the one of the calls' deadlines.
        """
        self._compute = compute
        self._on_round = on_round
        self._clock = clock
        self._scheduler: Scheduler[_Ticket] = Scheduler(compute.room)
        self._in_flight: dict[Job, _Ticket] = {}
        self._suspects: list[list[_Ticket]] = []
        self._pending: dict[Call, set[_Ticket]] = {}  # the event loop's: whose futures aren't done
        self._wake = threading.Condition()
        self._stopping = False
        self._healthy = True
        self._beats = 0
        self._checking = False
        self._speed = Speed()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warm: asyncio.Future[None]
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    # ---- what others may ask, from any thread ----

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
        """Whether the last thing that the model computed succeeded."""
        return self._healthy

    @property
    def beats(self) -> int:
        """Grows with everything that the thread gets done."""
        return self._beats

    @property
    def has_work(self) -> bool:
        """Whether there is anything that should make it grow."""
        return bool(self._checking or self._in_flight or self._suspects or self._scheduler)

    @property
    def waiting(self) -> int:
        """Sentences that have not ended and are not being computed."""
        return len(self._scheduler) + sum(map(len, tuple(self._suspects)))

    @property
    def in_flight(self) -> int:
        """Sentences being computed."""
        return len(self._in_flight)

    # ---- on the event loop ----

    async def start(self) -> None:
        """Starts the thread and waits until the model has computed something; results go to the running event loop.

        Raises:
            Exception: what the model raised, if it failed.
        """
        self._loop = asyncio.get_running_loop()
        self._warm = self._loop.create_future()
        self._thread.start()
        await self._warm

    async def stop(self) -> None:
        """End the thread after the round it is at; what is not done is refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
            if self._thread.is_alive():
                _log.error("the inference thread doesn't end; it is left behind")
        self._refuse_pending(_shutting_down)

    def submit(self, job: Job) -> asyncio.Future[Outcome]:
        """Queue a job.

        The future ends in an `Outcome` or a `RefusalError`, or is cancelled by `abandon`. Cancelling it drops the job.
        """
        ticket = _Ticket(job, asyncio.get_running_loop().create_future(), self._clock())
        with self._wake:
            refusal = self._why_not()
            if refusal is None:
                self._scheduler.add(ticket, job.call, ticket.n_steps, job.call.deadline_s)
                self._wake.notify()
        if refusal is None:
            self._pending.setdefault(job.call, set()).add(ticket)
            ticket.future.add_done_callback(lambda _: self._forget(ticket))
        else:
            _resolve([(ticket, refusal)])
        return ticket.future

    def abandon(self, call: Call) -> None:
        """Cancel everything of a call that nobody waits for any more."""
        with self._wake:
            self._end(self._scheduler.discard(call))
        for ticket in tuple(self._pending.get(call, ())):
            ticket.future.cancel()

    def refuse_pending(self) -> None:
        """Refuse every sentence because the model fails; for when the thread can't."""
        self._refuse_pending(_failing)

    def _refuse_pending(self, refusal: _Refusal) -> None:
        with self._wake:
            self._end(self._scheduler.drain())
        _resolve([(ticket, refusal()) for tickets in self._pending.values() for ticket in tickets])

    def _forget(self, ticket: _Ticket) -> None:
        """A future is done. If the thread didn't do it, the sentence may still be waiting."""
        tickets = self._pending[ticket.job.call]
        tickets.discard(ticket)
        if not tickets:
            del self._pending[ticket.job.call]
        if ticket.status is not _Status.WAITING:  # nor will it be again: no need for the lock
            return
        with self._wake:
            if self._scheduler.remove(ticket, ticket.job.call):
                self._end([ticket])

    def _why_not(self) -> RefusalError | None:
        if self._stopping:
            return _shutting_down()
        return None if self._healthy else _failing()

    # ---- in the thread ----

    def _run(self) -> None:
        refusal: _Refusal = _failing
        try:
            if self._warm_up():
                while self._wait_for_work():
                    self._work()
                    self._beats += 1
                refusal = _shutting_down
        except Exception:
            _log.critical("the inference thread ends by an error of its own", exc_info=True)
        finally:
            with self._wake:
                self._healthy = False  # whatever comes from now on is refused
            self._refuse_all(refusal)
            # … and what an error of its own left in none of its places
            self._call_loop(lambda: self._refuse_pending(refusal))

    def _warm_up(self) -> bool:
        """Compute something small for `start`; return whether that succeeded."""
        failure: Exception | None = None
        try:
            self._compute.probe()
        except Exception as error:
            failure = error

        def report() -> None:
            if self._warm.done():  # `start` was cancelled
                return
            if failure is None:
                self._warm.set_result(None)
            else:
                self._warm.set_exception(failure)

        self._call_loop(report)
        return failure is None

    def _wait_for_work(self) -> bool:
        """Whether to go on; now and then also without work, to see whether the model still works."""
        with self._wake:
            timeout_s = _IDLE_CHECK_INTERVAL_S if self._healthy else _PROBE_INTERVAL_S
            self._wake.wait_for(lambda: self._stopping or self.has_work, timeout_s)
            return not self._stopping

    def _work(self) -> None:
        if not self._healthy:
            self._probe()
        elif not self.has_work:
            self._check()
        self._drop_given_up()
        if self._suspects:
            self._let_suspects_join()
        else:
            self._let_join()
        self._advance()

    def _drop_given_up(self) -> None:
        for ticket in [ticket for ticket in self._in_flight.values() if ticket.given_up]:
            try:
                self._compute.leave(ticket.job)
            except Exception:
                _log.exception("a sentence can't leave")
                self._recover()
                return
            self._exit([(ticket, None)])

    def _let_join(self) -> None:
        now_s = self._clock()
        with self._wake:
            decision = self._scheduler.decide(now_s)
            for ticket in decision.items:
                ticket.status, ticket.joined_s = _Status.COMPUTING, now_s
        self._exit([(ticket, _late()) for ticket in decision.expired])
        self._join(decision.items)

    def _let_suspects_join(self) -> None:
        """One group at a time, and nobody else."""
        if not self._in_flight:
            self._join(self._suspects.pop())

    def _join(self, tickets: Sequence[_Ticket]) -> None:
        unfit: list[_Ticket] = []
        for ticket in tickets:
            if ticket.given_up:
                self._exit([(ticket, None)])
                continue
            self._in_flight[ticket.job] = ticket
            try:
                self._compute.join(ticket.job)
            except Exception:
                _log.exception("a sentence can't join")
                del self._in_flight[ticket.job]
                unfit.append(ticket)
        if unfit:
            self._refuse_unfit(unfit)

    def _refuse_unfit(self, tickets: Sequence[_Ticket]) -> None:
        """Either these sentences are at fault, or the model has failed; with others in flight the next round shows."""
        works = bool(self._in_flight) or self._probe()
        self._exit([(ticket, internal_error() if works else _failing()) for ticket in tickets])

    def _advance(self) -> None:
        if not self._in_flight:
            return
        begun_s, rows, steps = self._clock(), len(self._in_flight), self._compute.steps
        try:
            ended = [(self._in_flight[job], computed) for job, computed in self._compute.advance()]
        except Exception:
            _log.exception("a round of %d sentences failed", rows)
            self._on_round(Round(rows, 0, self._clock() - begun_s, failed=True))
            self._recover()
            return
        now_s = self._clock()
        done = Round(rows, self._compute.steps - steps, now_s - begun_s)
        self._speed.add(done.steps, done.seconds)
        self._exit([(ticket, ticket.outcome(computed, now_s)) for ticket, computed in ended])
        self._on_round(done)

    def _recover(self) -> None:
        """Find out whether the model still works, and if so which sentence of those in flight it fails at."""
        if not self._probe():
            return
        tickets = list(self._in_flight.values())
        self._in_flight.clear()
        if len(tickets) == 1:
            self._exit([(tickets[0], internal_error())])
            return
        self._exit([(ticket, None) for ticket in tickets if ticket.given_up])
        left = [ticket for ticket in tickets if ticket.status is not _Status.ENDED]
        half = len(left) // 2
        self._suspects += [group for group in (left[half:], left[:half]) if group]  # they keep their capacity

    def _exit(self, results: Sequence[tuple[_Ticket, _Result]]) -> None:
        """The way out for every sentence that the thread has: nothing of it is left, and its future ends."""
        with self._wake:
            self._end(ticket for ticket, _ in results)
        found = [(ticket, result) for ticket, result in results if result is not None]
        if found:
            self._call_loop(lambda: _resolve(found))

    def _end(self, tickets: Iterable[_Ticket]) -> None:
        """Take back what sentences hold; with the lock held, once for each."""
        for ticket in tickets:
            if ticket.status is _Status.COMPUTING:
                self._in_flight.pop(ticket.job, None)
                self._scheduler.release(ticket.n_steps)
            ticket.status = _Status.ENDED

    def _check(self) -> None:
        """A model that nobody asks can be dead, too."""
        self._checking = True  # it can hang, too
        try:
            self._compute.check()
        except Exception:
            _log.exception("the model failed a self-check")
            self._probe()
        finally:
            self._checking = False

    def _probe(self) -> bool:
        """Finds out, after a failure, whether the model still works at all; if not, refuses everybody who waits."""
        try:
            self._compute.probe()
            healthy = True
        except Exception:
            _log.exception("the model fails")
            healthy = False
        with self._wake:
            self._healthy = healthy
        if not healthy:
            self._refuse_all(_failing)
        return healthy

    def _refuse_all(self, refusal: _Refusal) -> None:
        suspects = [ticket for group in self._suspects for ticket in group]
        self._suspects.clear()
        with self._wake:
            waiting = self._scheduler.drain()
        self._exit([(ticket, refusal()) for ticket in (*self._in_flight.values(), *suspects, *waiting)])

    def _call_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None  # noqa: S101 - start() set it before the thread ran
        with suppress(RuntimeError):  # the loop was closed while the thread hung: nobody waits any more
            self._loop.call_soon_threadsafe(callback)


def _shutting_down() -> RefusalError:
    return RefusalError(Reason.SHUTTING_DOWN, "the server is shutting down")


def _late() -> RefusalError:
    return RefusalError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the sentence's turn came")


def _failing() -> RefusalError:
    return RefusalError(Reason.MODEL_FAILING, "the model fails at the moment; another replica may do better")


def _resolve(results: Sequence[tuple[_Ticket, Outcome | RefusalError]]) -> None:
    for ticket, result in results:
        if ticket.given_up:
            continue
        if isinstance(result, RefusalError):
            ticket.future.set_exception(result)
            ticket.future.exception()  # marks it as retrieved: a call that ends at its first refusal reads no other
        else:
            ticket.future.set_result(result)
