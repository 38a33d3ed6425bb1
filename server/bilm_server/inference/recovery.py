"""What is done after a failure: find out whether the engine works at all, and which sentence it fails at."""

import logging
from collections.abc import Sequence

from bilm_model.device import is_lost
from bilm_model.engine.types import Engine

from bilm_server.inference.types import Sentence

_log = logging.getLogger(__name__)


class Recovery:
    """Probing and bisection; used from the worker's thread only, save `n_suspects` and `lost`.

    A failed round doesn't identify the sentence at fault. So its sentences become suspects: they are computed again
    from their beginnings, in halves and halves of halves, until the one that fails by itself is found.

    Attributes:
        lost: whether the device has failed for good, see `is_lost`.
    """

    def __init__(self, engine: Engine[Sentence]) -> None:
        """Set the engine."""
        self._engine = engine
        self._groups: list[list[Sentence]] = []
        self.lost = False

    def __bool__(self) -> bool:
        """Whether there are suspects."""
        return bool(self._groups)

    @property
    def n_suspects(self) -> int:
        """Sentences that are to be computed again; for any thread."""
        return sum(map(len, tuple(self._groups)))

    def note(self, error: Exception) -> None:
        """Take what the engine has raised."""
        self.lost = self.lost or is_lost(error)

    def probe(self) -> bool:
        """Drop everything in flight and compute something small; return whether that succeeded."""
        if self.lost:
            return False
        try:
            self._engine.warm_up()
        except Exception as error:
            _log.exception("the model fails")
            self.note(error)
            return False
        return True

    def check(self) -> bool:
        """Compute something small while nothing is in flight; return whether the result is the expected one."""
        try:
            self._engine.check()
        except Exception as error:
            _log.exception("the model failed a self-check")
            self.note(error)
            return False
        return True

    def join(self, sentences: Sequence[Sentence]) -> list[Sentence]:
        """Let sentences join the engine; return those that it can't take.

        Raises:
            Exception: what the engine raised when it was to drop what it couldn't take; its state is unknown.
        """
        try:
            self._engine.join(sentences)
        except Exception as error:
            _log.exception("%s can't join", "a sentence" if len(sentences) == 1 else f"{len(sentences)} sentences")
            self.note(error)
        else:
            return []
        self._engine.drop(sentences)  # it should hold none of them, but it has just failed
        if len(sentences) == 1:
            return [*sentences]
        return [sentence for sentence in sentences if self.join([sentence])]

    def bisect(self, sentences: Sequence[Sentence]) -> None:
        """Make suspects of the sentences of a failed round, in two groups."""
        half = len(sentences) // 2
        self._groups += [[*group] for group in (sentences[half:], sentences[:half]) if group]

    def next_group(self) -> list[Sentence]:
        """Take out the suspects that are to be computed next, by themselves."""
        return self._groups.pop()

    def drain(self) -> list[Sentence]:
        """Take out all suspects."""
        suspects = [sentence for group in self._groups for sentence in group]
        self._groups.clear()
        return suspects
