"""Runs jobs on the model: what the inference thread drives."""

from dataclasses import dataclass

import numpy as np
from bilm_model.engine.engine import EmbeddedSentence, Engine, Sentence, Ticket
from bilm_model.engine.transfer import HostCopy
from numpy.typing import NDArray

from bilm_server.jobs import Computed, Job
from bilm_server.responses import wire_tensor
from bilm_server.scheduler import Room


@dataclass(frozen=True, eq=False)
class _Arrival:
    """A result on its way from the device.

    Attributes:
        vectors: as wanted, in the format of the wire.
        state: h and c, where they were asked for.
    """

    vectors: HostCopy
    state: tuple[HostCopy, HostCopy] | None

    @classmethod
    def of(cls, job: Job, embedded: EmbeddedSentence) -> "_Arrival":
        """Makes of a result what its caller wants, and sends it on its way."""
        vectors = wire_tensor(job.wanted.selection(embedded.layers), job.wanted.data_type)
        state = (HostCopy(embedded.h.clone()), HostCopy(embedded.c.clone())) if job.want_state else None
        return cls(HostCopy(vectors), state)

    def done(self) -> bool:
        return all(copy.done() for copy in (self.vectors, *(self.state or ())))

    def computed(self) -> Computed:
        """Waits if it has not arrived."""
        array = self.vectors.array()
        state = None if self.state is None else (_floats(self.state[0]), _floats(self.state[1]))
        return Computed(array.astype(array.dtype.newbyteorder("<"), copy=False), state)


def _floats(copy: HostCopy) -> NDArray[np.float32]:
    return copy.array().astype(np.float32, copy=False)


class ModelCompute:
    """`inference.Compute` on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tickets: dict[Job, Ticket] = {}
        self._jobs: dict[Ticket, Job] = {}
        self._arriving: dict[Job, _Arrival] = {}

    @property
    def room(self) -> Room:
        """What may be in flight."""
        return Room(self._engine.max_rows, self._engine.max_tokens)

    @property
    def steps(self) -> int:
        """Steps that sentences have been advanced by since the start."""
        return self._engine.stats.steps

    def join(self, job: Job) -> None:
        """Takes a job in, for which there is room."""
        ticket = self._engine.join(Sentence(job.sentence.tokens, job.state))
        self._tickets[job], self._jobs[ticket] = ticket, job

    def leave(self, job: Job) -> None:
        """Drops a job in flight."""
        if self._arriving.pop(job, None) is None:
            ticket = self._tickets.pop(job)
            del self._jobs[ticket]
            self._engine.leave(ticket)

    def advance(self) -> list[tuple[Job, Computed]]:
        """Moves everything in flight on; returns what has ended and has arrived here."""
        for ticket, embedded in self._engine.advance():
            job = self._jobs.pop(ticket)
            del self._tickets[job]
            self._arriving[job] = _Arrival.of(job, embedded)
        # With nothing left to compute there is nothing better to do than to wait
        arrived = [job for job, arrival in self._arriving.items() if arrival.done() or not self._jobs]
        return [(job, self._arriving.pop(job).computed()) for job in arrived]

    def probe(self) -> None:
        """Drops everything in flight and computes something small; raises if that fails."""
        for jobs in (self._tickets, self._jobs, self._arriving):
            jobs.clear()
        self._engine.warm_up()

    def check(self) -> None:
        """Computes something small while nothing is in flight; raises if that fails or has changed."""
        self._engine.check()
