"""Programs that end with the test that started them, and what a process holds."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The project's folder, in which `module_command` finds its module."""
MIB = 2**20
_LOOK_INTERVAL_S = 0.01


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of the tests; run it in `ROOT`."""
    return [sys.executable, "-m", module, *arguments]


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Start a program; kill it at the end, however that comes.

    `Popen` as a context manager waits for the program, without end where a failed assertion left it running.

    Args:
        command: The program and its arguments.
        options: Further arguments of `subprocess.Popen`.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> float:
    """Wait for what has no event here: another process, or the far end of a connection.

    Returns:
        The seconds that it took.

    Raises:
        AssertionError: It took longer than `timeout_s`; the message says `what` never happened.
    """
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begun_s < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(_LOOK_INTERVAL_S)
    return time.monotonic() - begun_s


def free_port() -> int:
    """Return a port of the loopback that nothing listens on: a server that is restarted needs the port that it had."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """Return the memory that a process has in RAM, or with "VmHWM" has had at most."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc has no {field} of {pid}")


def descriptors(pid: int) -> int:
    """Return the number of open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - as fast as it can be: it is asked in a loop
