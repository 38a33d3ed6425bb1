"""Servers in processes of their own, which may be stopped in any way."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, Self, cast

from bilm_client.testing.server import ServerStartError, wait_until_serving

from tests.support.fork_server import ForkedProcess, ForkRequest, fork_server
from tests.support.processes import free_port
from tests.support.servers import with_defaults

START_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 60.0
_SERVING, _LISTENING, _HEALTH = "health: SERVING", r"listening on (\S+?)[\s\"]", r"health alone on (\S+)"
_HTTP = r"HTTP on https?://([^\s\",;]+)"


class ProcessServer:
    """`bilm-serve` on a tiny model, as a process; as a context manager it is started, and killed in the end.

    It is a fork of a process that has done the first seconds of a start, unless it has to be there from the beginning.

    Args:
        flags: Further ones of `bilm-serve`.
        listen: Where; "": a free port of the loopback, kept over restarts.
        log: A file that its output is appended to; None: `lines` has it. Without `lines` the port is chosen beforehand;
            with them its log level must be info or debug, for `start` waits for a line.
        max_descriptors: Its limit of open files; None: the present one.
        module: Whose `main` it runs.
        environment: Further variables.
        fresh: Whether Python starts anew, so that it sees the variables when it imports.
        prefix: A command that runs a fresh one, as `unshare --net` does.

    Attributes:
        lines: What it has written, growing.
    """

    def __init__(
        self,
        *flags: str,
        listen: str = "",
        log: Path | None = None,
        max_descriptors: int | None = None,
        module: str = "bilm_server.main",
        environment: Mapping[str, str] = MappingProxyType({}),
        fresh: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        self.lines: list[str] = []
        self.log = log
        self._listen = listen or (f"127.0.0.1:{free_port()}" if log else "")
        self._flags = flags
        self._max_descriptors = max_descriptors
        self._module = module
        self._command = [*prefix, sys.executable, "-m", module.removesuffix(".main")] if fresh or prefix else []
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | ForkedProcess | None = None
        self._reader: threading.Thread | None = None
        self._listens_or_ended, self._serves_or_ended = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def process(self) -> "subprocess.Popen[bytes] | ForkedProcess":
        assert self._process is not None, "the server was never started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def target(self) -> str:
        return self._listen or self._found(_LISTENING)

    @property
    def health_target(self) -> str:
        """Where it answers for its health alone."""
        return self._found(_HEALTH)

    @property
    def http_address(self) -> str:
        """Where it listens for HTTP, HOST:PORT."""
        return self._found(_HTTP)

    @property
    def port(self) -> int:
        return int(self.target.rpartition(":")[2])

    def text(self) -> str:
        """Return what it has written; whole once it has ended."""
        return "".join(self.lines) if self.log is None else self.log.read_text(encoding="utf-8", errors="replace")

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it, or start it again, and wait until it is SERVING.

        Raises:
            ServerStartError: It ended first, or took longer than `timeout_s`.
        """
        self.launch()
        try:
            self.wait_until_serving(timeout_s)
        except BaseException:
            self.kill()
            raise
        self._listen = self.target

    def wait_until_serving(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until a server that has been launched is SERVING.

        Raises:
            ServerStartError: It ended first, or took longer than `timeout_s`.
        """
        if self.log is not None:
            wait_until_serving(self.target, cast(Any, self.process), timeout_s)
        elif not (self._serves_or_ended.wait(timeout_s) and any(_SERVING in line for line in self.lines)):
            raise ServerStartError(f"the server is not SERVING:\n{self.text()}")

    def wait_until_listening(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until a server that has been launched listens, which it does before its model is loaded.

        Raises:
            ServerStartError: It ended first, or took longer than `timeout_s`.
        """
        if not (self._listens_or_ended.wait(timeout_s) and re.search(_LISTENING, self.text())):
            raise ServerStartError(f"the server doesn't listen:\n{self.text()}")

    def launch(self) -> None:
        """Start it without waiting."""
        self._listens_or_ended.clear()
        self._serves_or_ended.clear()
        if self.log is not None:
            with self.log.open("ab") as output:
                self._process = self._launched(output.fileno())
            return
        self.lines.clear()
        reading, writing = os.pipe()
        try:
            self._process = self._launched(writing)
        finally:
            os.close(writing)
        self._reader = threading.Thread(target=self._read, args=(os.fdopen(reading, "rb"),))
        self._reader.start()

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float | None = _STOP_TIMEOUT_S) -> int:
        """Wait for its end (None: for ever); return its exit code, as `subprocess` has it."""
        code = self.process.wait(timeout_s)
        if self._reader is not None:
            self._reader.join()
        return code

    def terminate(self) -> int:
        """Let it drain and end, by SIGTERM; return the exit code."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it by SIGKILL, wherever it is; again does nothing."""
        if self._process is not None:
            self._process.kill()
            self.wait()

    def _launched(self, output: int) -> "subprocess.Popen[bytes] | ForkedProcess":
        flags = with_defaults(self._flags, self._listen or "127.0.0.1:0")
        if not self._command:
            request = ForkRequest(self._module, flags, self._environment, str(Path.cwd()), self._max_descriptors)
            return fork_server().fork(request, output)
        command = [*self._command, *flags]
        if self._max_descriptors is not None:
            command = limited(command, self._max_descriptors)
        return subprocess.Popen(command, env=self._environment, stdout=output, stderr=output)

    def _read(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self.lines.append(line.decode(errors="replace"))
                if re.search(_LISTENING, self.lines[-1]):
                    self._listens_or_ended.set()
                if _SERVING in self.lines[-1]:
                    self._serves_or_ended.set()
        self._listens_or_ended.set()
        self._serves_or_ended.set()  # it ended

    def _found(self, pattern: str) -> str:
        found = re.search(pattern, self.text())
        assert found, self.text()
        return found[1]


def limited(command: Sequence[str], max_descriptors: int) -> list[str]:
    """Return the command that runs another one under a limit of descriptors."""
    return ["sh", "-c", f'ulimit -n {max_descriptors} && exec "$@"', "sh", *command]
