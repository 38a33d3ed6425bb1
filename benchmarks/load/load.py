"""The other end of the load generator's pipe."""

import os
import sys
from typing import Any

from benchmarks.load.pipe import PipedProcess
from benchmarks.paths import ROOT


class LoadGenerator(PipedProcess):
    """A load generator's process, as a context manager.

    Args:
        target: of the server.
        sentences: how many it has.
        protocol: see `generator`.
        python: whose packages it uses.
        options: further flags: layers, pool, dtype, content, priority, model.
    """

    def __init__(
        self, target: str, sentences: int, protocol: str = "bilm", python: str = sys.executable, **options: str
    ) -> None:
        flags = {"target": target, "sentences": str(sentences), "protocol": protocol, **options}
        arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
        # Another Python than ours has no bilm_bench installed
        path = os.pathsep.join(filter(None, [str(ROOT / "client"), os.environ.get("PYTHONPATH")]))
        super().__init__([python, "-m", "benchmarks.load.generator", *arguments], {"PYTHONPATH": path})

    def closed(self, callers: int, per_call: int, warm_s: float, seconds: float) -> dict[str, Any]:
        """Run callers that wait for their responses; see `Generator.closed`."""
        return self.ask("closed", callers=callers, per_call=per_call, warm_s=warm_s, seconds=seconds)

    def open(self, rate: float, seconds: float, seed: int, max_in_flight: int) -> dict[str, Any]:
        """Run calls that don't wait; see `Generator.open`."""
        return self.ask("open", rate=rate, seconds=seconds, seed=seed, max_in_flight=max_in_flight)

    def singles(self, first: int, count: int) -> list[float]:
        """Return latencies in ms, one call after another."""
        latencies: list[float] = self.ask("singles", first=first, count=count)["latencies_ms"]
        return latencies
