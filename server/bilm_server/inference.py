"""Glue between the event loop and the model's own thread: sentences go in as jobs, results come back as futures."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bilm_server.errors import Reason, RefusalError, internal_error
from bilm_server.requests import PreparedSentence, State, Wanted
from bilm_server.scheduler import Room, Scheduler

_log = logging.getLogger("bilm_server.inference")

# A guess until something has been measured; only the pushback of the first refusals depends on it.
_INITIAL_TOKENS_PER_S = 5000.0
_SPEED_WEIGHT = 0.05

# How often a model that fails is tried again; a balancer sends nothing that would show that it has recovered.
_PROBE_INTERVAL_S = 1.0


@dataclass(eq=False)
class Call:
    """An RPC: the unit of fairness, and of giving up.

    Attributes:
        deadline_s: on the clock of `time.monotonic`.
        abandoned: whether nobody waits for it any more.
    """

    deadline_s: float
    abandoned: bool = False


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a sentence.

    Attributes:
        vectors: as wanted, in the format of the wire.
        state: after the sentence, where it was asked for.
        queue_s: seconds between its arrival and its joining the engine.
        inference_s: seconds between that and its end.
    """

    vectors: NDArray[np.generic]
    state: State | None
    queue_s: float
    inference_s: float


@dataclass(frozen=True, eq=False)
class Job:
    """A sentence to compute.

    Attributes:
        sentence: what.
        wanted: what of it.
        state: to go on from.
        want_state: whether the state after it is needed.
        call: whose it is.
    """

    sentence: PreparedSentence
    wanted: Wanted
    state: State | None
    want_state: bool
    call: Call


@dataclass(frozen=True, eq=False)
class Computed:
    """What a `Compute` gives for one job."""

    vectors: NDArray[np.generic]
    state: State | None


class Compute(Protocol):
    """The model, as this thread drives it."""

    @property
    def room(self) -> Room:
        """What may be in flight."""

    def join(self, job: Job) -> None:
        """Takes a job in, for which there is room."""

    def leave(self, job: Job) -> None:
        """Drops a job in flight."""

    def advance(self) -> list[tuple[Job, Computed]]:
        """Moves everything in flight on; returns what has ended."""

    def probe(self) -> None:
        """Drops everything in flight and computes something small; raises if that fails."""


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
    """Runs the model in a thread of its own: who waits joins as soon as there is room, and all advance together."""

    def __init__(self, compute: Compute, on_health: Callable[[bool], None]) -> None:
        """Prepares; `start` starts.

        Args:
            compute: the model.
            on_health: told on the event loop whether the model works, each time that was in doubt.
        """
        self._compute = compute
        self._scheduler: Scheduler[_Ticket] = Scheduler(compute.room)
        self._in_flight: dict[Job, _Ticket] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._on_health = on_health
        self._healthy = True
        self._tokens_per_s = _INITIAL_TOKENS_PER_S
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warm: asyncio.Future[None]
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    @property
    def tokens_per_s(self) -> float:
        """Recent speed."""
        return self._tokens_per_s

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
            await asyncio.to_thread(self._thread.join)

    def submit(self, job: Job) -> asyncio.Future[Outcome]:
        """Queues a job; called on the event loop.

        The future ends in an `Outcome` or a `RefusalError`.
        """
        ticket = _Ticket(job, asyncio.get_running_loop().create_future())
        with self._wake:
            if self._stopping:
                ticket.future.set_exception(RefusalError(Reason.SHUTTING_DOWN, "the server is shutting down"))
                return ticket.future
            self._scheduler.add(ticket, job.call, ticket.n_steps, job.call.deadline_s)
            self._wake.notify()
        return ticket.future

    def abandon(self, call: Call) -> None:
        """Drops everything of a call that nobody waits for any more."""
        with self._wake:
            call.abandoned = True
            self._scheduler.discard(call)

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            self._compute.probe()
        except Exception as error:
            failure = error
            self._call_loop(lambda: self._warm.set_exception(failure))
            return
        self._call_loop(lambda: self._warm.set_result(None))
        while self._wait_for_work():
            if not self._healthy:
                self._probe()
            self._drop_abandoned()
            self._let_join()
            self._advance()

    def _wait_for_work(self) -> bool:
        """Whether to go on; while the model fails, also after some time without work."""
        with self._wake:
            timeout_s = None if self._healthy else _PROBE_INTERVAL_S
            self._wake.wait_for(lambda: self._stopping or self._in_flight or self._scheduler, timeout_s)
            if self._stopping:
                refusal = RefusalError(Reason.SHUTTING_DOWN, "the server is shutting down")
                self._deliver([(ticket, refusal) for ticket in (*self._in_flight.values(), *self._scheduler.drain())])
            return not self._stopping

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
        begun_s = time.monotonic()
        try:
            ended = self._compute.advance()
        except Exception:
            # Whatever the reason: nothing can be said of anyone in flight, all hear of it, and the thread must go on.
            _log.exception("a round of %d sentences failed", len(self._in_flight))
            self._fail_all()
            return
        tickets = [(self._in_flight[job], computed) for job, computed in ended]
        for ticket, _ in tickets:
            self._end(ticket)
        self._measure(sum(ticket.n_steps for ticket, _ in tickets), time.monotonic() - begun_s)
        self._deliver([(ticket, ticket.outcome(computed)) for ticket, computed in tickets])

    def _fail_all(self) -> None:
        tickets = list(self._in_flight.values())
        for ticket in tickets:
            self._end(ticket)
        self._probe()
        self._deliver([(ticket, internal_error()) for ticket in tickets])

    def _end(self, ticket: _Ticket) -> None:
        del self._in_flight[ticket.job]
        with self._wake:
            self._scheduler.release(ticket.n_steps)

    def _probe(self) -> None:
        """Finds out, after a failure, whether the model still works at all."""
        try:
            self._compute.probe()
            healthy = True
        except Exception:
            _log.exception("the model fails")
            healthy = False
        self._healthy = healthy
        self._call_loop(lambda: self._on_health(healthy))

    def _measure(self, tokens: int, seconds: float) -> None:
        """Sentences end in some rounds and not in others: a mean over many."""
        self._tokens_per_s += _SPEED_WEIGHT * (tokens / max(seconds, 1e-6) - self._tokens_per_s)

    def _deliver(self, results: Sequence[tuple[_Ticket, Outcome | RefusalError]]) -> None:
        if results:
            self._call_loop(lambda: _resolve(results))

    def _call_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None  # noqa: S101 - start() set it before the thread ran
        self._loop.call_soon_threadsafe(callback)


def _resolve(results: Sequence[tuple[_Ticket, Outcome | RefusalError]]) -> None:
    for ticket, result in results:
        if ticket.future.done():
            continue  # given up meanwhile
        if isinstance(result, RefusalError):
            ticket.future.set_exception(result)
        else:
            ticket.future.set_result(result)
