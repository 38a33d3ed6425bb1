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
from bilm_server.scheduler import Batch, Scheduler

_log = logging.getLogger("bilm_server.inference")

# A guess until something has been measured; only the pushback of the first refusals depends on it.
_INITIAL_TOKENS_PER_S = 5000.0
_SPEED_WEIGHT = 0.2

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
class BatchTiming:
    """A batch, as the results of its sentences know it.

    Attributes:
        inference_s: seconds of computation.
    """

    inference_s: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a sentence.

    Attributes:
        vectors: as wanted, in the format of the wire.
        state: after the sentence, where it was asked for.
        queue_s: seconds it waited.
        batch: that it was computed in.
    """

    vectors: NDArray[np.generic]
    state: State | None
    queue_s: float
    batch: BatchTiming


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

    def run(self, jobs: Sequence[Job], abandoned: Callable[[], bool]) -> list[Computed] | None:
        """Computes a batch; None if it was left because `abandoned` said so."""

    def probe(self) -> None:
        """Computes something small; raises if that fails."""


@dataclass(eq=False)
class _Ticket:
    job: Job
    future: asyncio.Future[Outcome]
    arrived_s: float = field(default_factory=time.monotonic)


class InferenceThread:
    """Runs the model in a thread of its own, one batch after another, whatever is waiting at the time."""

    def __init__(self, compute: Compute, max_batch_rows: int, on_health: Callable[[bool], None]) -> None:
        """Prepares; `start` starts.

        Args:
            compute: the model.
            max_batch_rows: tokens and boundaries of a batch.
            on_health: told on the event loop whether the model works, each time that was in doubt.
        """
        self._compute = compute
        self._scheduler: Scheduler[_Ticket] = Scheduler(max_batch_rows)
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
        """Ends the thread after the batch it is at; what still waits is refused."""
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
            self._scheduler.add(ticket, job.call, len(job.sentence.tokens) + 2, job.call.deadline_s)
            self._wake.notify()
        return ticket.future

    def abandon(self, call: Call) -> None:
        """Drops everything of a call that nobody waits for any more."""
        call.abandoned = True
        with self._wake:
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
        while (batch := self._wait_for_batch()) is not None:
            if not self._healthy:
                self._probe()
            self._serve(batch)
            del batch  # while the thread waits, nothing must hold on to its results

    def _wait_for_batch(self) -> Batch[_Ticket] | None:
        """What there is to do, possibly nothing if the model fails; None when the thread is to end."""
        with self._wake:
            timeout_s = None if self._healthy else _PROBE_INTERVAL_S
            self._wake.wait_for(lambda: self._stopping or bool(self._scheduler), timeout_s)
            if self._stopping:
                self._refuse_all()
                return None
            return self._scheduler.next_batch(time.monotonic())

    def _serve(self, batch: Batch[_Ticket]) -> None:
        late = RefusalError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the sentence's turn came")
        self._deliver([(ticket, late) for ticket in batch.expired])
        tickets = [ticket for ticket in batch.items if not ticket.job.call.abandoned]
        if tickets:
            self._deliver(self._compute_batch(tickets))

    def _compute_batch(self, tickets: list[_Ticket]) -> list[tuple[_Ticket, Outcome | RefusalError]]:
        begun_s = time.monotonic()
        try:
            computed = self._compute.run(
                [ticket.job for ticket in tickets], lambda: all(ticket.job.call.abandoned for ticket in tickets)
            )
        except Exception:
            # One batch has failed, whatever the reason: its callers hear of it, and the thread must go on.
            _log.exception("a batch of %d sentences failed", len(tickets))
            self._probe()
            return [(ticket, internal_error()) for ticket in tickets]
        if computed is None:
            return []
        timing = BatchTiming(time.monotonic() - begun_s)
        self._measure(sum(len(ticket.job.sentence.tokens) for ticket in tickets), timing.inference_s)
        return [
            (ticket, Outcome(result.vectors, result.state, begun_s - ticket.arrived_s, timing))
            for ticket, result in zip(tickets, computed, strict=True)
        ]

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
        if tokens:
            self._tokens_per_s += _SPEED_WEIGHT * (tokens / max(seconds, 1e-6) - self._tokens_per_s)

    def _refuse_all(self) -> None:
        refusal = RefusalError(Reason.SHUTTING_DOWN, "the server is shutting down")
        while self._scheduler:
            batch = self._scheduler.next_batch(time.monotonic())
            self._deliver([(ticket, refusal) for ticket in (*batch.items, *batch.expired)])

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
