"""Programs that end with the test that started them."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The project's folder, in which `module_command` finds its module."""


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
