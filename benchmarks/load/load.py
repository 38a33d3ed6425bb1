"""The other end of the load generator's pipe."""

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from benchmarks.paths import ROOT


class GeneratorError(Exception):
    """The generator's call failed, or its process ended."""


class LoadGenerator:
    """A load generator's process, as a context manager.

    Args:
        target: of the server.
        sentences: how many it has.
        protocol: "bilm" or "triton".
        python: whose packages it uses.
        options: further flags: layers, pool, dtype.
    """

    def __init__(
        self, target: str, sentences: int, protocol: str = "bilm", python: str = sys.executable, **options: str
    ) -> None:
        flags = {"target": target, "sentences": str(sentences), "protocol": protocol, **options}
        arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
        self._command = [python, "-m", "benchmarks.load.generator", *arguments]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        # Another Python than ours has no bilm_bench installed
        path = os.pathsep.join(filter(None, [str(ROOT / "client"), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.communicate()  # its standard input ends, and so does it

    def ask(self, do: str, **wish: float) -> dict[str, Any]:
        """Send a request, and wait for its response.

        Raises:
            GeneratorError: if nothing came of it.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **wish}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise GeneratorError(f"the generator ended with code {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise GeneratorError(reply["error"])
        return reply

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
