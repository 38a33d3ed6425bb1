"""Values made of files, made anew when they change."""

import hashlib
import logging
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from bilm_system.files import open_ordinary

from bilm_server.errors import ConfigurationError

T = TypeVar("T")

# A file that is this new may change again without a sign of it: some file systems count time in steps of two seconds.
_SETTLED_NS = 2_000_000_000
_OTHERS = stat.S_IROTH | stat.S_IWOTH

Stamp = tuple[int, int, int, int, int]
"""What a look at a file shows of a change: device, inode, size, times of modification and of change in ns."""


def stamp_of(path: Path) -> Stamp:
    """Return a file's stamp."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class ReloadedFiles(Generic[T]):
    """A value made of the contents of some files; any thread may ask for it.

    To see whether a file has changed costs a `stat`; replaced files, rewritten ones and moved links are seen. A change
    that can't be used leaves the value as it was: it is logged once, and the files are tried again at each look.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        make: Callable[[Sequence[bytes]], T],
        log: logging.Logger,
        *,
        stamp: Callable[[Path], Stamp] = stamp_of,
    ) -> None:
        """Keep what values are made of; call `load` for the first one.

        Args:
            paths: the files.
            make: makes the value of their contents, in this order. Raises ValueError, with a message for the log: it
                names the file and nothing of its content.
            log: takes the changes and what is wrong with them.
            stamp: looks at a file.
        """
        self._stamp = stamp
        self._paths, self._make, self._log = tuple(paths), make, log
        self._lock = threading.Lock()
        self._value: T | None = None
        self._stamps: tuple[Stamp, ...] | None = None
        self._digests: tuple[bytes, ...] = ()
        self._reported: object = None

    def load(self) -> T:
        """Return the value, after reading the files for the first time.

        Raises:
            ConfigurationError: what is wrong with them.
        """
        with self._lock:
            try:
                return self._look()
            except (OSError, ValueError) as error:
                raise ConfigurationError(_message(error)) from error

    def current(self) -> T:
        """Return the value of the files as they are now, or as they were when they were last good; after `load`."""
        with self._lock:
            try:
                value = self._look()
            except (OSError, ValueError) as error:
                self._report(error)
                assert self._value is not None  # noqa: S101 - load() came first
                return self._value
            self._reported = None
            return value

    def _look(self) -> T:
        stamps = tuple(map(self._stamp, self._paths))
        if self._value is not None and stamps == self._stamps:
            return self._value
        contents = [_read(path) for path in self._paths]
        digests = tuple(hashlib.sha256(content).digest() for content in contents)
        if self._value is None or digests != self._digests:
            again = self._value is not None
            self._value, self._digests = self._make(contents), digests
            if again:
                self._log.info("loaded again: %s", self._names())
        self._stamps = stamps if _settled(stamps) else None
        return self._value

    def _report(self, error: OSError | ValueError) -> None:
        try:
            seen: object = (tuple(map(self._stamp, self._paths)), _message(error))
        except OSError:
            seen = _message(error)
        if seen != self._reported:
            self._log.error("%s; what was loaded before stays in use: %s", _message(error), self._names())
        self._reported = seen

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


def warn_if_open_to_others(path: Path, log: logging.Logger) -> None:
    """Warn if a file with secrets can be read or written by every user of the machine."""
    mode = path.stat().st_mode
    if mode & _OTHERS:
        log.warning("%s can be read or written by every user of this machine (mode %03o)", path, stat.S_IMODE(mode))


def _read(path: Path) -> bytes:
    with open_ordinary(path) as file:
        return file.read()


def _settled(stamps: tuple[Stamp, ...]) -> bool:
    newest_ns = max(mtime_ns for *_, mtime_ns, _ in stamps)
    return not 0 <= time.time_ns() - newest_ns < _SETTLED_NS


def _message(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
