"""Runs jobs on the model: what the inference thread drives."""

from bilm_model.engine.engine import EmbeddedSentence, Engine, Sentence, Ticket

from bilm_server.inference import Computed, Job
from bilm_server.responses import wire_array
from bilm_server.scheduler import Room


class ModelCompute:
    """`inference.Compute` on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tickets: dict[Job, Ticket] = {}
        self._jobs: dict[Ticket, Job] = {}

    @property
    def room(self) -> Room:
        """What may be in flight."""
        options = self._engine.options
        return Room(options.max_rows, options.max_tokens)

    def join(self, job: Job) -> None:
        """Takes a job in, for which there is room."""
        ticket = self._engine.join(Sentence(job.sentence.tokens, job.state))
        self._tickets[job], self._jobs[ticket] = ticket, job

    def leave(self, job: Job) -> None:
        """Drops a job in flight."""
        ticket = self._tickets.pop(job)
        del self._jobs[ticket]
        self._engine.leave(ticket)

    def advance(self) -> list[tuple[Job, Computed]]:
        """Moves everything in flight on; makes of what has ended what its caller wants."""
        ended = []
        for ticket, embedded in self._engine.advance():
            job = self._jobs.pop(ticket)
            del self._tickets[job]
            ended.append((job, _finish(job, embedded)))
        return ended

    def probe(self) -> None:
        """Drops everything in flight and computes something small; raises if that fails."""
        self._tickets.clear()
        self._jobs.clear()
        self._engine.warm_up()


def _finish(job: Job, embedded: EmbeddedSentence) -> Computed:
    vectors = wire_array(job.wanted.selection(embedded.layers), job.wanted.data_type)
    state = (embedded.h.cpu().numpy().copy(), embedded.c.cpu().numpy().copy()) if job.want_state else None
    return Computed(vectors, state)
