"""Printing that must not cost what was computed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_SCRIPT = """
import sys
from pathlib import Path
from bilm_system.terminal import run_command

def command():
    print("naïve 日本語", flush=True)
    print("more")
    print("and a warning ⚠", file=sys.stderr)
    Path(sys.argv[1]).write_text("whole")
    return {code}

sys.exit(run_command("bilm-x", command, failed=3))
"""

Run = Callable[..., tuple[int, bytes, bytes]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command by a shell, with redirections of its own; its result is whole whatever becomes of its output."""

    def run(redirections: str, *, code: int = 0, encoding: str = "utf-8") -> tuple[int, bytes, bytes]:
        (script := tmp_path / "script.py").write_text(_SCRIPT.format(code=code), "utf-8")
        result = tmp_path / "result"
        line = f"set -o pipefail; {sys.executable} -W error {script} {result} {redirections}"
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        ended = subprocess.run(["bash", "-c", line], capture_output=True, env=environment, timeout=240, check=False)
        assert result.read_text() == "whole"
        return ended.returncode, ended.stdout, ended.stderr

    return run


def test_what_an_encoding_lacks_is_escaped(run: Run) -> None:
    code, out, err = run("", encoding="cp1252")
    assert (code, out) == (0, b"na\xefve \\u65e5\\u672c\\u8a9e\nmore\n")
    assert err == b"and a warning \\u26a0\n"


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_descriptors_are_no_error(run: Run, redirections: str) -> None:
    assert run(redirections)[0] == 0


def test_a_reader_that_has_gone_ends_it_quietly(run: Run) -> None:
    code, out, err = run("| true")
    assert (code, out) == (141, b"")
    assert err == "and a warning ⚠\n".encode()
    assert run("| true", code=1)[0] == 1  # what the command says comes first
    assert run("2>&1 | cat")[0] == 0


def test_a_full_disk_behind_standard_output_is_one_line(run: Run) -> None:
    code, _, err = run("> /dev/full")
    assert (code, err.splitlines()[1:]) == (3, [b"bilm-x: standard output: No space left on device"])


def test_standard_error_that_cannot_be_written_costs_nothing(run: Run) -> None:
    assert run("2> /dev/full")[:2] == (0, "naïve 日本語\nmore\n".encode())


@pytest.mark.parametrize(
    "command", ["bilm-embed", "bilm-bench", "bilm-health", "bilm-models", "bilm-serve", "bilm-convert", "bilm-train"]
)
def test_the_help_of_every_command_can_be_cut_off(command: str) -> None:
    path = Path(sys.executable).with_name(command)
    line = f"set -o pipefail; {path} --help | true"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, timeout=120, check=False)
    assert (ended.returncode in (0, 141), ended.stderr) == (True, b"")
