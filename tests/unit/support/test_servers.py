"""The launchers of the tests' servers: forks are processes like others, and what a server still holds is seen."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bilm_server.embedding.admission import Cost

from tests.support.fork_server import ForkedProcess, ForkRequest, fork_server
from tests.support.servers import serving


def fork(folder: Path, *arguments: str) -> tuple[ForkedProcess, int]:
    """Return a fork, and the descriptor that its output comes by."""
    reading, writing = os.pipe()
    request = ForkRequest(
        "tests.unit.support.forked", arguments, {**os.environ, "BILM_TEST_WORD": "spoken"}, str(folder), 77
    )
    try:
        return fork_server().fork(request, writing), reading
    finally:
        os.close(writing)


def test_a_fork_has_surroundings_and_an_exit_code_of_its_own(tmp_path: Path) -> None:
    process, reading = fork(tmp_path, "7")
    with os.fdopen(reading) as output:
        assert output.read() == f"spoken {tmp_path} 77\nan error\n"
    assert process.wait(60) == process.poll() == process.returncode == 7


@pytest.mark.parametrize(
    ("end", "code"), [(ForkedProcess.kill, -signal.SIGKILL), (ForkedProcess.terminate, -signal.SIGTERM)]
)
def test_a_fork_ends_by_a_signal(tmp_path: Path, end: Callable[[ForkedProcess], None], code: int) -> None:
    process, reading = fork(tmp_path, "wait")
    with os.fdopen(reading) as output:
        output.readline()
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        end(process)
        assert process.wait(60) == code
        end(process)  # again does nothing


def test_what_a_server_still_holds_is_seen() -> None:
    with serving() as server:

        async def reserve() -> object:
            return server.admission.reserve(Cost(5, 0), lambda: 1)

        reservation = server.call(reserve)
        with pytest.raises(AssertionError, match="admitted"):
            server.check_nothing_is_left(0.01)
        server.call(lambda: _released(reservation))


async def _released(reservation: object) -> None:
    reservation.release()  # type: ignore[attr-defined]
