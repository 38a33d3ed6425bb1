"""The model that the inference thread drives."""

from bilm_model.engine.types import Capacity, Engine

from bilm_server.jobs import Computed, Job


class ModelCompute:
    """`inference.Compute` on an engine."""

    def __init__(self, engine: Engine[Job]) -> None:
        self._engine = engine

    @property
    def room(self) -> Capacity:
        """What may be in flight."""
        return self._engine.capacity

    @property
    def steps(self) -> int:
        """Steps that sentences have been advanced by since the start."""
        return self._engine.stats.steps

    def join(self, job: Job) -> None:
        """Take a job in, for which there is room."""
        self._engine.join([job])

    def leave(self, job: Job) -> None:
        """Drop a job in flight."""
        self._engine.drop([job])

    def advance(self) -> list[tuple[Job, Computed]]:
        """Advance everything in flight; return what has ended and has arrived here."""
        return [(result.sentence, Computed(result.vectors, result.state)) for result in self._engine.advance()]

    def probe(self) -> None:
        """Drop everything in flight and compute something small; raise if that fails."""
        self._engine.warm_up()

    def check(self) -> None:
        """Compute something small while nothing is in flight; raise if that fails or has changed."""
        self._engine.check()
