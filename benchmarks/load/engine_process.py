"""The other end of an engine worker's pipe."""

import sys
from typing import Any

from benchmarks.load.pipe import PipedProcess
from benchmarks.trees import PRESENT, Tree


class EngineProcess(PipedProcess):
    """An engine's process, as a context manager.

    Args:
        sentences: of WikiText-2's test part; their words are known.
        tree: whose engine.
        flags: further ones of `benchmarks.load.engine_worker`, with `_` for `-`; None leaves one out, True needs none.
    """

    def __init__(self, sentences: int, tree: Tree = PRESENT, **flags: str | int | bool | None) -> None:
        command = [sys.executable, "-m", "benchmarks.load.engine_worker", "--api", tree.engine_api]
        command += ["--sentences", str(sentences)]
        for name, value in flags.items():
            if value is not None and value is not False:
                command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        super().__init__(command, tree.environment)

    def backend(self) -> str:
        """Return what computes."""
        return str(self.ask("about")["backend"])

    def full(self, seconds: float) -> dict[str, Any]:
        """Measure the engine with all rows taken; see `Work`."""
        return self.ask("full", seconds=seconds)

    def tokens_per_s(self, seconds: float) -> float:
        """Return the throughput with all rows taken."""
        return float(self.full(seconds)["tokens_per_s"])

    def singles(self, first: int, count: int) -> list[float]:
        """Return latencies in ms, one sentence after another."""
        return list(self.ask("singles", first=first, count=count)["latencies_ms"])

    def paced(self, n_tokens: int, count: int, pause_s: float) -> list[float]:
        """Return latencies in ms of a sentence of so many known words, each after a pause."""
        return list(self.ask("paced", n_tokens=n_tokens, count=count, pause_s=pause_s)["latencies_ms"])
