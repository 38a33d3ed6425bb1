"""`bilm-serve` with a model that fails on request, for tests: the first token of a sentence says how.

While the file that BILM_TEST_BROKEN names exists, the model fails whatever it is asked.
"""

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import bilm_server.served_model
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.types import EngineResult, StateCodec
from bilm_server.inference.types import Sentence
from bilm_server.main import main

POISON = "<poison>"
"""An exception as long as this sentence is in flight."""
EXHAUST = "<exhaust>"
"""The same, and it is a MemoryError."""
HANG = "<hang>"
"""A round that never ends."""


class FaultyEngine(RecurrentEngine[Sentence]):
    """Computes, unless it is to fail."""

    def __init__(self, batch: CellularBatch, state_codec: StateCodec) -> None:
        super().__init__(batch, state_codec)
        self._broken = Path(os.environ["BILM_TEST_BROKEN"])
        self._first: dict[Sentence, str] = {}

    def join(self, sentences: Sequence[Sentence]) -> None:
        super().join(sentences)
        self._first.update((sentence, sentence.tokens[0]) for sentence in sentences)

    def drop(self, sentences: Iterable[Sentence]) -> None:
        dropped = list(sentences)
        for sentence in dropped:
            self._first.pop(sentence, None)
        super().drop(dropped)

    def advance(self) -> list[EngineResult[Sentence]]:
        self._fail_if_broken()
        found = set(self._first.values())
        if POISON in found:
            raise ValueError("a poisoned sentence")
        if EXHAUST in found:
            raise MemoryError
        if HANG in found:
            threading.Event().wait()
        ended = super().advance()
        for result in ended:
            del self._first[result.sentence]
        return ended

    def warm_up(self) -> None:
        self._first.clear()
        self._fail_if_broken()
        super().warm_up()

    def _fail_if_broken(self) -> None:
        if self._broken.exists():
            raise RuntimeError("the device is gone")


if __name__ == "__main__":
    vars(bilm_server.served_model)["RecurrentEngine"] = FaultyEngine
    sys.exit(main())
