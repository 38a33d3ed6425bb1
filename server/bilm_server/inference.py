"""Glue between the event loop and the model's own thread: sentences go in as jobs, results come back as futures."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bilm_server.errors import Reason, RefusalError, internal_error
from bilm_server.jobs import Call, Compute, Computed, Job, Outcome
from bilm_server.scheduler import Scheduler

_log = logging.getLogger("bilm_server.inference")

# A guess until something has been measured; only the pushback of the first refusals depends on it.
_INITIAL_TOKENS_PER_S = 5000.0
_SPEED_WEIGHT = 0.05

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
        seconds: that it took.
        failed: whether it did.
    """

    rows: int
    seconds: float
    failed: bool = False


@dataclass(eq=False)
class _Ticket:
    job: Job
    future: asyncio.Future[Outcome]
    arrived_s: float = field(default_factory=time.monotonic)
    joined_s: float = 0.0

    @property
    def n_steps(self) -> int:
        return self.job.sentence.n_steps

    def outcome(self, computed: Computed) -> Outcome:
        queue_s, inference_s = self.joined_s - self.arrived_s, time.monotonic() - self.joined_s
        return Outcome(computed.vectors, computed.state, queue_s, inference_s)


class InferenceThread:
    """Runs the model in a thread of its own: who waits joins as soon as there is room, and all advance together.

    A round that fails is nobody's in particular. So its sentences are computed again from their beginnings, in halves
    and halves of halves, until the one that fails by itself is found: its caller gets INTERNAL, the others their
    results. Where even the probe fails, everybody gets MODEL_FAILING until it succeeds again.
    """

    def __init__(self, compute: Compute, on_round: Callable[[Round], None] = lambda round: None) -> None:
        """Prepares; `start` starts.

        Args:
            compute: the model.
            on_round: told in the thread what each round did; must neither raise nor take long.
        """
        self._compute = compute
        self._on_round = on_round
        self._scheduler: Scheduler[_Ticket] = Scheduler(compute.room)
        self._in_flight: dict[Job, _Ticket] = {}
        self._suspects: list[list[_Ticket]] = []
        self._pending: set[_Ticket] = set()  # of the event loop's
        self._wake = threading.Condition()
        self._stopping = False
        self._healthy = True
        self._beats = 0
        self._checking = False
        self._tokens_per_s = _INITIAL_TOKENS_PER_S
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warm: asyncio.Future[None]
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    # ---- what others may ask, from any thread ----

    @property
    def tokens_per_s(self) -> float:
        """Recent speed."""
        return self._tokens_per_s

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
        """Sentences that have not been answered and are not being computed."""
        return max(0, len(self._pending) - len(self._in_flight))

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
        """Ends the thread after the round it is at; what is not done is refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
            if self._thread.is_alive():
                _log.error("the inference thread doesn't end; it is left behind")

    def submit(self, job: Job) -> asyncio.Future[Outcome]:
        """Queues a job.

        The future ends in an `Outcome` or a `RefusalError`.
        """
        ticket = _Ticket(job, asyncio.get_running_loop().create_future())
        with self._wake:
            refusal = self._why_not()
            if refusal is None:
                self._scheduler.add(ticket, job.call, ticket.n_steps, job.call.deadline_s)
                self._wake.notify()
        if refusal is None:
            self._pending.add(ticket)
            ticket.future.add_done_callback(lambda _: self._pending.discard(ticket))
        else:
            ticket.future.set_exception(refusal)
        return ticket.future

    def abandon(self, call: Call) -> None:
        """Drops everything of a call that nobody waits for any more."""
        with self._wake:
            call.abandoned = True
            self._scheduler.discard(call)

    def refuse_pending(self) -> None:
        """Tells everybody who waits that the model fails; for when the thread can't."""
        _resolve([(ticket, _failing()) for ticket in list(self._pending)])

    def _why_not(self) -> RefusalError | None:
        if self._stopping:
            return _shutting_down()
        return None if self._healthy else _failing()

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            self._compute.probe()
        except Exception as error:
            failure = error
            self._call_loop(lambda: self._warm.set_exception(failure))
            return
        self._call_loop(lambda: self._warm.set_result(None))
        refusal = _failing()
        try:
            while self._wait_for_work():
                self._work()
                self._beats += 1
            refusal = _shutting_down()
        except Exception:
            _log.critical("the inference thread ends by an error of its own", exc_info=True)
        finally:
            with self._wake:
                self._healthy = False  # whatever comes from now on is refused
            self._refuse_all(refusal)

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
        self._drop_abandoned()
        if self._suspects:
            self._let_suspects_join()
        else:
            self._let_join()
        self._advance()

    def _drop_abandoned(self) -> None:
        for ticket in [ticket for ticket in self._in_flight.values() if ticket.job.call.abandoned]:
            self._compute.leave(ticket.job)
            self._end(ticket)

    def _let_join(self) -> None:
        now_s = time.monotonic()
        with self._wake:
            decision = self._scheduler.decide(now_s)
        late = RefusalError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the sentence's turn came")
        self._deliver([(ticket, late) for ticket in decision.expired])
        for ticket in decision.items:
            ticket.joined_s = now_s
        self._join(decision.items)

    def _let_suspects_join(self) -> None:
        """One group at a time, and nobody else."""
        if not self._in_flight:
            group = self._suspects.pop()
            gone = [ticket for ticket in group if ticket.job.call.abandoned]
            self._release(gone)
            self._join([ticket for ticket in group if ticket not in gone])

    def _join(self, tickets: Sequence[_Ticket]) -> None:
        for ticket in tickets:
            self._in_flight[ticket.job] = ticket
            try:
                self._compute.join(ticket.job)
            except Exception:
                _log.exception("a sentence can't join")
                self._end(ticket)
                self._deliver([(ticket, internal_error())])

    def _advance(self) -> None:
        if not self._in_flight:
            return
        begun_s, rows = time.monotonic(), len(self._in_flight)
        try:
            ended = self._compute.advance()
        except Exception:
            _log.exception("a round of %d sentences failed", rows)
            self._on_round(Round(rows, time.monotonic() - begun_s, failed=True))
            self._find_culprit()
            return
        seconds = time.monotonic() - begun_s
        tickets = [(self._in_flight[job], computed) for job, computed in ended]
        for ticket, _ in tickets:
            self._end(ticket)
        self._measure(sum(ticket.n_steps for ticket, _ in tickets), seconds)
        self._on_round(Round(rows, seconds))
        self._deliver([(ticket, ticket.outcome(computed)) for ticket, computed in tickets])

    def _find_culprit(self) -> None:
        tickets = list(self._in_flight.values())
        self._in_flight.clear()
        if not self._probe():
            self._release(tickets)
            self._deliver([(ticket, _failing()) for ticket in tickets])
        elif len(tickets) == 1:
            self._release(tickets)
            self._deliver([(ticket, internal_error()) for ticket in tickets])
        else:
            half = len(tickets) // 2
            self._suspects += [tickets[half:], tickets[:half]]  # their room stays theirs

    def _end(self, ticket: _Ticket) -> None:
        del self._in_flight[ticket.job]
        self._release([ticket])

    def _release(self, tickets: Sequence[_Ticket]) -> None:
        with self._wake:
            for ticket in tickets:
                self._scheduler.release(ticket.n_steps)

    def _check(self) -> None:
        """A model that nobody asks can be dead, too."""
        self._checking = True  # it can hang, too
        try:
            self._compute.check()
        except Exception:
            _log.exception("the model failed while it was idle")
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
            self._refuse_all(_failing())
        return healthy

    def _refuse_all(self, refusal: RefusalError) -> None:
        suspects = [ticket for group in self._suspects for ticket in group]
        tickets = [*self._in_flight.values(), *suspects]
        self._in_flight.clear()
        self._suspects.clear()
        self._release(tickets)
        with self._wake:
            tickets += self._scheduler.drain()
        self._deliver([(ticket, refusal) for ticket in tickets])

    def _measure(self, tokens: int, seconds: float) -> None:
        """Sentences end in some rounds and not in others: a mean over many."""
        self._tokens_per_s += _SPEED_WEIGHT * (tokens / max(seconds, 1e-6) - self._tokens_per_s)

    def _deliver(self, results: Sequence[tuple[_Ticket, Outcome | RefusalError]]) -> None:
        if results:
            self._call_loop(lambda: _resolve(results))

    def _call_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None  # noqa: S101 - start() set it before the thread ran
        self._loop.call_soon_threadsafe(callback)


def _shutting_down() -> RefusalError:
    return RefusalError(Reason.SHUTTING_DOWN, "the server is shutting down")


def _failing() -> RefusalError:
    return RefusalError(Reason.MODEL_FAILING, "the model fails at the moment; another replica may do better")


def _resolve(results: Sequence[tuple[_Ticket, Outcome | RefusalError]]) -> None:
    for ticket, result in results:
        if ticket.future.done():
            continue  # given up meanwhile
        if isinstance(result, RefusalError):
            ticket.future.set_exception(result)
        else:
            ticket.future.set_result(result)
