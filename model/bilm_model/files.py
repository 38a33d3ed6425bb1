"""Files that people name: read without waiting or tracebacks, text with or without a byte order mark, written whole."""

import codecs
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_OTHER_ENCODINGS = (  # UTF-32 first: its mark in little-endian order begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32, little-endian"),
    (codecs.BOM_UTF32_BE, "UTF-32, big-endian"),
    (codecs.BOM_UTF16_LE, "UTF-16, little-endian"),
    (codecs.BOM_UTF16_BE, "UTF-16, big-endian"),
)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


# ---- reading ---------------------------------------------------------------------------------------------------------


def text_start(head: bytes) -> int:
    """Return where a UTF-8 text begins: 3 behind a byte order mark, which is no part of it, otherwise 0.

    Args:
        head: The first four bytes of the file, or more.

    Raises:
        ValueError: The byte order mark is another encoding's; the message names it.
    """
    for mark, name in _OTHER_ENCODINGS:
        if head.startswith(mark):
            raise ValueError(f"the text is {name}, expected UTF-8")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def decode_text(data: bytes) -> str:
    """Return the text of a UTF-8 file without its byte order mark; lines end as in the file.

    Raises:
        ValueError: It isn't UTF-8.
    """
    return data[text_start(data) :].decode("utf-8")


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, or of a pipe that somebody writes into (`<(command)`).

    Raises:
        OSError: It can't be read, or is neither.
        ValueError: No file can have this name.
    """
    with _open(path) as file:
        if not (stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode) or stat.S_ISFIFO(mode)):
            raise OSError(errno.EINVAL, f"{_kind(mode)}, expected a file", str(path))
        return file.read()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte order mark; lines end as in the file.

    Raises:
        OSError: It can't be read.
        ValueError: It isn't UTF-8, or no file can have this name.
    """
    return decode_text(read_bytes(path))


def _open(path: Path) -> BinaryIO:
    # A pipe without a writer is empty, then, instead of being waited for; once open, it is read as usual
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISFIFO(mode):
        os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def _kind(mode: int) -> str:
    return next((name for is_it, name in _KINDS if is_it(mode)), "not an ordinary file")


def open_ordinary(path: Path) -> BinaryIO:
    """Open a file for reading: no pipe, which would be waited for, and no device, which might be read for ever.

    Raises:
        OSError: It can't be opened, or is something else.
        ValueError: No file can have this name.
    """
    file = _open(path)
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(errno.EINVAL, f"{_kind(mode)}, expected a file", str(path))
    return file


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Puts a new file in another's place, at once and for good, or leaves the other as it is.

    Yields:
        Where the body is to write it: beside `path`, so that renaming is all that remains to be done.

    Raises:
        OSError: if it can't be written (no space, for one); names `path`, whatever the body made of the error.
    """
    draft = path.with_name(path.name + ".part")
    with naming(path):
        try:
            yield draft
            _sync(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder can't be opened
            _sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all; see `replaced`."""
    with replaced(path) as draft:
        draft.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all; see `replaced`.

    Raises:
        OSError: It can't be written, or the text holds a file's name that isn't UTF-8.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise OSError(errno.EILSEQ, "a name in it isn't UTF-8", str(path)) from error
    write_bytes(path, data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the name of a file to errors that know none, as those of failed writes; let those of other files pass."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):  # torch.save's own ("unexpected pos") hides the reason behind it
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError) or not str(cause.filename or path).startswith(str(path)):
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from error


# ---- locks -----------------------------------------------------------------------------------------------------------


def lock(file: BinaryIO, flock: Callable[[BinaryIO, int], None] | None = None) -> bool:
    """Lock an open file against other processes; closing it, or the end of this process, unlocks it.

    Args:
        file: To lock.
        flock: The system's call; None: `fcntl.flock`.

    Returns:
        False where the system or the file system has no locks: then nothing keeps a second process out.

    Raises:
        BlockingIOError: Another process has it.
    """
    try:
        import fcntl  # noqa: PLC0415 - not on Windows
    except ImportError:
        return False
    try:
        (flock or fcntl.flock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_ANOTHER:
            raise BlockingIOError(error.errno, error.strerror) from error
        return False
    return True
