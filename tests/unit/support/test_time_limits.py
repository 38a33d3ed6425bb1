"""A test that hangs costs its own time, wherever it hangs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import time_limits

TESTS = """
import ctypes, threading
import pytest
import time_limits

time_limits.GRACE_S = 0.5
for_ever = threading.Event().wait

@pytest.fixture
def hangs_before():
    for_ever()

@pytest.fixture
def hangs_after():
    yield
    for_ever()

@pytest.mark.timeout(0.2)
def test_hangs():
    for_ever()

@pytest.mark.timeout(0.2)
def test_hangs_in_a_fixture(hangs_before):
    pass

@pytest.mark.timeout(0.2)
async def test_hangs_in_a_loop():
    import asyncio
    await asyncio.Event().wait()

@pytest.mark.timeout(0.2)
def test_hangs_with_the_lock_of_the_interpreter():
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

@pytest.mark.timeout(0.2)
def test_hangs_after_it_has_failed(hangs_after):
    assert not "right"

def test_leaves_a_thread():
    threading.Thread(target=for_ever).start()

def test_after():
    print("the run continues")
"""


CONFIGURATION = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on these tests, in a process of its own, with none of the suite's fixtures."""
    (folder / "test_it.py").write_text(TESTS, encoding="utf-8")
    (folder / "pytest.ini").write_text(CONFIGURATION, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(time_limits.__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "time_limits", "-s", "--no-header", "--tb=line", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_hang_is_interrupted_and_the_run_continues(tmp_path: Path) -> None:
    names = ["test_hangs", "test_hangs_in_a_fixture", "test_hangs_in_a_loop", "test_after"]
    done = run(tmp_path, *(f"test_it.py::{name}" for name in names))
    assert "the run continues" in done.stdout
    assert "2 failed, 1 passed" in done.stdout
    assert "1 error" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    "name", ["test_hangs_with_the_lock_of_the_interpreter", "test_hangs_after_it_has_failed", "test_leaves_a_thread"]
)
def test_a_hang_that_no_signal_ends_ends_the_process(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, f"test_it.py::{name}")
    assert "Timeout (0:00:00" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(("attribute", "code"), [("workerinput", 0), ("", 1)], ids=["a worker", "a run"])
def test_a_worker_may_wait_for_the_others_at_its_end(attribute: str, code: int) -> None:
    """It has run its tests then; pytest-xdist ends it when all workers have."""
    program = f"""
import os, threading, types
import time_limits
time_limits.GRACE_S = 0.2
config = types.SimpleNamespace(stash={{time_limits._stderr: os.dup(2)}}, {attribute and attribute + "={}"})
time_limits.pytest_unconfigure(config)
threading.Event().wait(1)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(time_limits.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == code


def test_every_test_has_a_limit(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        marker = item.get_closest_marker("timeout")
        assert marker is not None
        assert marker.args[0] > 0
