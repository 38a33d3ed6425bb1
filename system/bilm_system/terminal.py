"""Printing that never costs what a command has computed.

Whatever standard output is (another encoding, a closed descriptor, a pipe without a reader, a full disk), a command
does its work, writes its files and ends with its exit code.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

READER_GONE = 141
"""Exit code of a command whose output nobody read to the end: 128 + SIGPIPE, as the shell reports it of others."""


class _Printer:
    """A text stream that keeps its first error instead of raising it, and drops what comes after.

    What the stream's encoding lacks is written as backslash escapes.

    Attributes:
        error: the first one; None: all has been printed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Print a text; return its length, as every stream does."""
        self._attempt(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        """Print what is buffered."""
        self._attempt(self._stream.flush)

    def discard(self) -> None:
        """Point the descriptor at the null device: the interpreter's last flush must find nothing to fail at."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, do: Callable[[], object]) -> None:
        if self.error is None:
            try:
                do()
            except (OSError, ValueError) as error:  # a ValueError where somebody has closed the stream
                self.error = error

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


def run_command(name: str, command: Callable[[], int | None], failed: int = 1) -> int:
    """Run a command whose printing can't fail.

    Args:
        name: of the command, for messages.
        command: returns the exit code; None: 0.
        failed: exit code where standard output can't be written for another reason than a reader that has gone.

    Returns:
        The command's exit code, or `INTERRUPTED` where the command leaves Ctrl-C to others. Where that is 0 and
        something could not be printed: `READER_GONE` or `failed`.

    Raises:
        SystemExit: As the command does (argparse, for --help); the code as above.
    """
    _occupy_standard_descriptors()
    with _printers() as (out, err):
        try:
            code, ended = command() or 0, False
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            code, ended = 0, True
        except KeyboardInterrupt:
            err.write(f"{name}: interrupted\n")
            code, ended = INTERRUPTED, False
        out.flush()
        if out.error is not None and code == 0:
            code = _report(name, out.error, err, failed)
    if ended:
        raise SystemExit(code)
    return code


def is_lost() -> bool:
    """Return whether standard output can't be written any more, so that a command without an end had better end."""
    return isinstance(sys.stdout, _Printer) and sys.stdout.error is not None


@contextlib.contextmanager
def _printers() -> Iterator[tuple[_Printer, _Printer]]:
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:

        def printer(stream: TextIO | None) -> _Printer:
            # None: closed when the process started; libraries write to it all the same
            return _Printer(stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8")))  # noqa: PTH123

        out, err = map(printer, before)
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield out, err
        finally:
            sys.stdout, sys.stderr = before
            for each in (out, err):
                each.flush()
                if each.error is not None:
                    each.discard()


def _report(name: str, error: OSError | ValueError, err: _Printer, failed: int) -> int:
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    err.write(f"{name}: standard output: {getattr(error, 'strerror', None) or error}\n")
    return failed


def _occupy_standard_descriptors() -> None:
    """Open the null device where 0, 1 or 2 is closed: the next file would get the number, and be printed into."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
