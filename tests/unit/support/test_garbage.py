"""What a test leaves open fails that test."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import garbage

TESTS = """
import socket

def test_that_leaves_a_socket_open():
    cycle = [socket.socket()]
    cycle.append(cycle)

def test_that_is_innocent():
    pass
"""


def test_what_is_left_open_fails_the_test_that_left_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    flags = ["-p", "garbage", "-p", "no:xdist", "-p", "no:asyncio", "-W", "error", "--rootdir", str(tmp_path), "-rA"]
    environment = {**os.environ, "PYTHONPATH": str(Path(garbage.__file__).parent)}
    command = [sys.executable, "-m", "pytest", *flags, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    outcomes = {line.split("::")[-1].split()[0]: line.split()[0] for line in done.stdout.splitlines() if "::" in line}
    assert outcomes == {"test_that_leaves_a_socket_open": "ERROR", "test_that_is_innocent": "PASSED"}, done.stdout
