"""A process that is asked through its standard input: one JSON line for each request and response."""

import json
import os
import subprocess
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from benchmarks.paths import ROOT


class PipeError(Exception):
    """The process reported an error, or ended."""


class PipedProcess:
    """A process, as a context manager.

    Args:
        command: Of a program that answers each line.
        environment: Variables besides this process's own.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, environment
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self._environment},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.communicate()  # its standard input ends, and so does it

    @property
    def process_id(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request, and wait for its response.

        Raises:
            PipeError: If the process reports an error or ends.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PipeError(f"the process ended with code {self._process.wait()}: {' '.join(self._command)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PipeError(reply["error"])
        return reply
