"""Programs that end with the test that started them."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


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
