"""What the fault tests share: a server process that may be stopped in any way, and what a process holds."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from bilm_client.testing.server import wait_until_serving

HERE = Path(__file__).parent
START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0
_LOOK_INTERVAL_S = 0.02


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """For what has no event of its own: another process, or the far end of a connection.

    Raises:
        AssertionError: It took longer than `timeout_s`; the message says `what` never happened.
    """
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"it never happened: {what}"
        time.sleep(_LOOK_INTERVAL_S)


def free_port() -> int:
    """A port of the loopback that nobody listens on: a server that comes back has to come back to the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resident_bytes(pid: int) -> int:
    """The memory that a process has in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc has no VmRSS of {pid}")


def descriptors(pid: int) -> int:
    """The open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - as fast as it can be: it is asked in a loop


@cache
def missing(*programs: str) -> str:
    """Why a test that needs these programs has to be skipped; "" if they are there."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"needs {', '.join(absent)}, not found" if absent else ""


@cache
def missing_namespace(*flags: str) -> str:
    """Why a test that needs namespaces (flags of `unshare`) has to be skipped; "" if this user may have them."""
    if reason := missing("unshare", "ip"):
        return reason
    tried = subprocess.run([*unshare(*flags), "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"needs a namespace of its own: {tried.stderr.strip()}"


def unshare(*flags: str) -> list[str]:
    """The start of a command that runs in namespaces of its own."""
    return ["unshare", *(() if os.geteuid() == 0 else ("--map-root-user",)), *flags]


class ServerProcess:
    """`bilm-serve` on a tiny model, as a process.

    Args:
        flags: Further flags.
        log: Where its standard error goes (appended).
        port: Of the loopback; 0: a free one, kept over restarts.
        program: What Python runs.
        prefix: A command that runs the server, as `unshare --net` does.
        environment: Further variables.
    """

    def __init__(
        self,
        *flags: str,
        log: Path,
        port: int = 0,
        program: Sequence[str] = ("-m", "bilm_server"),
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.target = f"127.0.0.1:{self.port}"
        self.log = log
        defaults = ("--model", "random:tiny", "--listen", self.target, "--drain-delay-s", "0")
        self._command = [*prefix, sys.executable, *program, *defaults, *flags]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "the server was never started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Starts it, or starts it again, and waits until it is SERVING.

        Raises:
            ServerStartError: It ended first, or took longer than `timeout_s`.
        """
        self.launch()
        try:
            wait_until_serving(self.target, self.process, timeout_s)
        except BaseException:
            self.kill()
            raise

    def launch(self) -> None:
        """Starts it without waiting."""
        self._stderr = self.log.open("ab")
        self._process = subprocess.Popen(self._command, env=self._environment, stdout=self._stderr, stderr=self._stderr)

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float | None = _STOP_TIMEOUT_S) -> int:
        """Waits for its end (None: for ever); its exit code, as `subprocess` has it."""
        code = self.process.wait(timeout_s)
        if self._stderr is not None:
            self._stderr.close()
        return code

    def terminate(self) -> int:
        """SIGTERM, the drain, the end; the exit code."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, wherever it is; again does nothing."""
        if self._process is not None:
            self._process.kill()
            self.wait()
