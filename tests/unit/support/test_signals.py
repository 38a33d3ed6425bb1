"""What the processes that tests start inherit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import signals

STATUS = Path("/proc/self/status")
PRINT_STATUS = f"print(open({str(STATUS)!r}).read())"
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1)
BLOCKED = (signal.SIGTERM, signal.SIGINT)
BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}  # which ignores them in itself, and restores them in its children
PROGRAM = f"""
import os, signal, subprocess, sys
for number in {tuple(map(int, IGNORED))}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {tuple(map(int, BLOCKED))})
if {{reset}}:
    sys.path.insert(0, {str(Path(signals.__file__).parent)!r})
    import signals
    signals.reset_inherited_signals()
for number in {tuple(map(int, IGNORED))}:
    os.kill(os.getpid(), number)
subprocess.run([sys.executable, "-S", "-c", {PRINT_STATUS!r}], check=True)
"""

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="reads /proc, which only Linux has")


def mask(status: str, field: str) -> set[int]:
    """The signals in one of the masks of /proc/PID/status."""
    bits = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(field + ":"))
    # The C library keeps two of the real-time signals for itself; nobody else can change those
    return {number for number in signal.valid_signals() if bits >> (number - 1) & 1}


def printed(program: str) -> str:
    command = [sys.executable, "-S", "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_processes_of_a_test_ignore_and_block_no_signal() -> None:
    """However the suite was started: `trap '' INT HUP` before `make test` makes this one fail without the reset."""
    status = printed(PRINT_STATUS)
    assert mask(status, "SigIgn") <= BY_PYTHON
    assert not mask(status, "SigBlk")


@pytest.mark.parametrize("reset", [False, True])
def test_ignored_signals_are_reset_for_children_and_stay_without_effect_here(reset: bool) -> None:
    status = printed(PROGRAM.format(reset=reset))
    assert mask(status, "SigIgn") - BY_PYTHON == (set() if reset else set(IGNORED))
    assert mask(status, "SigBlk") == (set() if reset else set(BLOCKED))
