"""Files that people name: read without waiting or tracebacks, text with or without a byte order mark, written whole."""

import codecs
import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
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


def reason(error: Exception) -> str:
    """Return what an error says, to stand behind a file's name: the system's words without number and name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def message(error: Exception) -> str:
    """Return a line for the terminal: what the system says behind the name of the file, where there is one."""
    return f"{error.filename}: {reason(error)}" if isinstance(error, OSError) and error.filename else str(error)


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


def check_readable(path: Path) -> None:
    """Check that a path names an ordinary file that can be read.

    Raises:
        ValueError: Why it can't.
    """
    try:
        open_ordinary(path).close()
    except OSError as error:
        raise ValueError(reason(error)) from error


# ---- writing ---------------------------------------------------------------------------------------------------------


def check_writable(path: Path, *, beside: tuple[str, ...] = ()) -> None:
    """Check that a file can be made, or replaced, at a path.

    Args:
        path: Where.
        beside: Endings of further files that will be made beside it.

    Raises:
        ValueError: Why it can't.
    """
    try:
        for name in (path, *(path.with_name(path.name + ending) for ending in beside)):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(mode := name.stat().st_mode):
                    raise ValueError(f"{_kind(mode)}, expected a file")
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except FileNotFoundError as error:
        raise ValueError("no such folder") from error
    except OSError as error:
        raise ValueError(reason(error)) from error
    effective = os.access in os.supports_effective_ids
    if path.exists() and not beside:  # written into as it is
        if not os.access(path, os.W_OK, effective_ids=effective):
            raise ValueError(os.strerror(errno.EACCES))
    elif not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise ValueError("the folder can't be written to")


def is_special(path: Path) -> bool:
    """Return whether a path is there and names neither a file nor a folder: a pipe, a device (`/dev/stdout`)."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def same_file(path: Path, other: Path) -> bool:
    """Return whether two paths lead to one file that exists."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Put a new file in another's place, whole and on the disk, or leave the other as it is.

    A symbolic link stays: the file that it leads to is replaced.

    Yields:
        Where to write it: beside that file, so that renaming is all that remains to be done.

    Raises:
        OSError: It can't be written; names `path`, whatever the body made of the error.
    """
    if path.is_symlink():
        path = path.resolve()
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
    """Write a file, whole or not at all; what is no file (`/dev/stdout`) is written to as it is.

    Raises:
        OSError: It can't be written.
    """
    if is_special(path):
        # Without waiting for a reader of a pipe
        with os.fdopen(os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)), "wb") as file:
            os.set_blocking(file.fileno(), True)
            file.write(data)
        return
    with replaced(path) as draft:
        draft.write_bytes(data)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file in UTF-8; see `write_bytes`.

    Args:
        path: Where.
        text: All of it.
        errors: Python's error handler for lone surrogates, which stand for names that aren't UTF-8: with
            "backslashreplace" they become escapes, which JSON reads back.

    Raises:
        OSError: It can't be written, or the text has lone surrogates and `errors` is "strict".
    """
    try:
        data = text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise OSError(errno.EILSEQ, "a name in it isn't UTF-8", str(path)) from error
    write_bytes(path, data)


def private_folder(path: Path) -> Path:
    """Return a folder's real path, which no other user can write to or replace; made with mode 700 where it is missing.

    Raises:
        PermissionError: Other users can change the folder or one above it; the message names which.
        OSError: It can't be made or written to.
    """
    path = path.absolute()
    for each in reversed((path, *path.parents)):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
    found = path.resolve(strict=True)
    if hasattr(os, "geteuid"):
        _check_owner(found, {os.geteuid()})
        for each in found.parents:
            _check_owner(each, {0, os.geteuid()}, sticky=True)
    if not os.access(found, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "not writable", str(found))
    return found


def protected_folder(path: Path) -> Path:
    """Return a folder's real path, which nobody but root and this user can write to or replace; nothing is made.

    Raises:
        FileNotFoundError: It isn't there.
        PermissionError: Other users can change the folder or one above it; the message names which.
        OSError: It can't be looked at.
    """
    found = path.resolve(strict=True)
    if hasattr(os, "geteuid"):
        _check_owner(found, {0, os.geteuid()})
        for each in found.parents:
            _check_owner(each, {0, os.geteuid()}, sticky=True)
    return found


def _check_owner(folder: Path, owners: set[int], *, sticky: bool = False) -> None:
    """Check that nobody else can change a folder; in a sticky one others can't touch what isn't theirs."""
    status = folder.lstat()
    if status.st_uid not in owners:
        raise PermissionError(errno.EPERM, "belongs to another user", str(folder))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky and status.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, "other users can write to it", str(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the name of a file to errors that know none, as those of failed writes; let those of other files pass."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):  # a library's own ("unexpected pos") hides the reason behind it
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError) or not str(cause.filename or path).startswith(str(path)):
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from error


# ---- locks -----------------------------------------------------------------------------------------------------------


def lock(file: BinaryIO | int, flock: Callable[[BinaryIO | int, int], None] | None = None) -> bool:
    """Lock an open file against other processes; closing it, or the end of this process, unlocks it.

    Args:
        file: To lock, or its descriptor.
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
