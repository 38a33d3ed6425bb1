"""`bilm-serve` with a model that fails on request, for tests: the first token of a sentence says how.

While the file that BILM_TEST_BROKEN names exists, the model fails whatever it is asked.
"""

import os
import sys
import threading
from pathlib import Path

import bilm_server.app
from bilm_model.engine.types import Engine
from bilm_server.compute import ModelCompute
from bilm_server.jobs import Computed, Job
from bilm_server.main import main

POISON = "<poison>"
"""An exception as long as this sentence is in flight."""
EXHAUST = "<exhaust>"
"""The same, and it is a MemoryError."""
HANG = "<hang>"
"""A round that never ends."""


class FaultyCompute(ModelCompute):
    """Computes, unless it is to fail."""

    def __init__(self, engine: Engine[Job]) -> None:
        super().__init__(engine)
        self._broken = Path(os.environ["BILM_TEST_BROKEN"])
        self._first: dict[Job, str] = {}

    def join(self, job: Job) -> None:
        self._first[job] = job.sentence.tokens[0]
        super().join(job)

    def leave(self, job: Job) -> None:
        del self._first[job]
        super().leave(job)

    def advance(self) -> list[tuple[Job, Computed]]:
        self._fail_if_broken()
        found = set(self._first.values())
        if POISON in found:
            raise ValueError("a poisoned sentence")
        if EXHAUST in found:
            raise MemoryError
        if HANG in found:
            threading.Event().wait()
        ended = super().advance()
        for job, _ in ended:
            del self._first[job]
        return ended

    def probe(self) -> None:
        self._first.clear()
        self._fail_if_broken()
        super().probe()

    def _fail_if_broken(self) -> None:
        if self._broken.exists():
            raise RuntimeError("the device is gone")


if __name__ == "__main__":
    vars(bilm_server.app)["ModelCompute"] = FaultyCompute
    sys.exit(main())
