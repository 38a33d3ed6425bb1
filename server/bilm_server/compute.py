"""Runs jobs on the model: what the inference thread drives."""

from collections.abc import Callable, Sequence

from bilm_model.engine.batch import AbandonedError, EmbeddedSentence, Sentence

from bilm_server.inference import Computed, Job
from bilm_server.responses import wire_array
from bilm_server.served_model import ServedModel


class ModelCompute:
    """`inference.Compute` on a served model."""

    def __init__(self, model: ServedModel) -> None:
        self._engine = model.engine

    def run(self, jobs: Sequence[Job], abandoned: Callable[[], bool]) -> list[Computed] | None:
        """Computes a batch and makes of each sentence what its caller wants; None if it was left unfinished."""
        try:
            embedded = self._engine.run([Sentence(job.sentence.tokens, job.state) for job in jobs], abandoned)
        except AbandonedError:
            return None
        return [_finish(job, sentence) for job, sentence in zip(jobs, embedded, strict=True)]

    def probe(self) -> None:
        """Computes something small; raises if that fails."""
        self._engine.warm_up()


def _finish(job: Job, embedded: EmbeddedSentence) -> Computed:
    vectors = wire_array(job.wanted.selection(embedded.layers), job.wanted.data_type)
    state = (embedded.h.cpu().numpy().copy(), embedded.c.cpu().numpy().copy()) if job.want_state else None
    return Computed(vectors, state)
