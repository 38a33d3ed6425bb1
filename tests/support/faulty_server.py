"""`bilm-serve` with a model that fails on request: the first token or the length of a sentence says how.

While the file that BILM_TEST_BROKEN names exists, the model fails whatever it is asked.
"""

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bilm_server.main
from bilm_server.config import ServerConfig
from bilm_server.inference.types import Sentence
from bilm_server.served_model import ServedModel, load_served_model

from tests.support.fake_engine import DEVICE_ASSERT, device_error
from tests.support.hooked_engine import HookedEngine, Hooks

POISON = "<poison>"
"""An exception as long as this sentence is in flight."""
EXHAUST = "<exhaust>"
"""The same, and it is a MemoryError."""
LOSE = "<lose>"
"""An error of the device after which nothing can be computed in the process."""
HANG = "<hang>"
"""A round that never ends."""
UNFIT_TOKENS = 1313
"""A sentence of so many tokens can't join."""
FAILING_TOKENS = 1717
"""The first round with a sentence of so many tokens fails."""
BROKEN = "BILM_TEST_BROKEN"


class Faults:
    """Decide whether an engine is to fail."""

    def __init__(self, engine: HookedEngine[Sentence], broken: Path) -> None:
        """Set the engine's hooks."""
        self._engine, self._broken = engine, broken
        self._failed: set[Sentence] = set()
        engine.hooks = Hooks(join=self._before_join, advance=self._before_advance, warm_up=self._check)

    def _before_join(self, sentences: Sequence[Sentence]) -> None:
        if any(len(sentence.tokens) == UNFIT_TOKENS for sentence in sentences):
            raise RuntimeError("the test lets joining fail")

    def _before_advance(self) -> None:
        self._check()
        first = {sentence.tokens[0] for sentence in self._engine.present}
        if POISON in first:
            raise ValueError("a poisoned sentence")
        if EXHAUST in first:
            raise MemoryError
        if LOSE in first:
            raise device_error(DEVICE_ASSERT)
        if HANG in first:
            threading.Event().wait()
        if (
            new := {sentence for sentence in self._engine.present if len(sentence.tokens) == FAILING_TOKENS}
            - self._failed
        ):
            self._failed |= new
            raise RuntimeError("the test lets a round fail")

    def _check(self) -> None:
        if self._broken.exists():
            raise RuntimeError("the device is gone")


def load_faulty_model(config: ServerConfig) -> ServedModel:
    """Load a model that fails on request."""
    model = load_served_model(config)
    engine: HookedEngine[Sentence] = HookedEngine(model.engine)
    Faults(engine, Path(os.environ[BROKEN]))
    return replace(model, engine=engine)


def main(argv: list[str] | None = None) -> int:
    """Run `bilm-serve`."""
    return bilm_server.main.main(argv, load_faulty_model)


if __name__ == "__main__":
    sys.exit(main())
