"""A Unix socket that belongs to one server; gRPC by itself unlinks a path at bind and at stop, even another server's.

gRPC binds a private path, which is then renamed to the public one, so that whatever gRPC unlinks is never there. A
lock file beside the socket says who owns the path; the kernel releases it with the process, however that ends.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import grpc
from bilm_system.files import lock

from bilm_server.addresses import private_path

_log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 1.0


def check_kinds(path: Path) -> None:
    """Check that nothing but a socket, with its lock file, stands where a server would listen; it may be in use.

    Raises:
        OSError: naming what is something else.
    """
    for found, is_right, kind in ((path, stat.S_ISSOCK, "socket"), (_lock_path(path), stat.S_ISREG, "regular file")):
        try:
            mode = found.lstat().st_mode
        except FileNotFoundError:
            continue
        if not is_right(mode):
            raise OSError(errno.EEXIST, f"exists and isn't a {kind}", str(found))


class UnixSocket:
    """A path that one process serves on at a time."""

    def __init__(self, path: Path, *, lock: Callable[[int], bool] = lock) -> None:
        """Keep the path; call `claim` to own it.

        Args:
            path: of the socket.
            lock: locks a file's descriptor; returns whether the file system has locks.
        """
        self._lock_file = lock
        self._path = path
        self._lock_path = _lock_path(path)
        self._lock: int | None = None
        self._identity: tuple[int, int, int] | None = None

    def claim(self) -> None:
        """Own the path, or find out who does; idempotent. A socket that a killed process has left is taken over.

        Raises:
            OSError: if another server listens there, the path is something else than a socket, or its folder can't be
                used.
        """
        if self._lock is not None:
            return
        check_kinds(self._path)
        self._lock = _locked(self._lock_path, self._lock_file)
        try:
            check_kinds(self._path)  # again, now that no other server changes it
            _check_free(self._path)
        except OSError:
            self.release()
            raise

    def bind(self, server: grpc.aio.Server, tls: grpc.ServerCredentials | None) -> None:
        """Have a server that has not started listen on the path, in place of one before it.

        Raises:
            OSError: if it can't be bound.
            RuntimeError: if gRPC can't bind it.
        """
        private = private_path(str(self._path))
        address = f"unix:{quote(private)}"
        if tls is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, tls)
        self._identity = _identity(Path(private))
        os.rename(private, self._path)  # noqa: PTH104 - Path.rename says nothing else

    def release(self) -> None:
        """Remove the socket, if it is still our own, and own the path no more; idempotent."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if self._identity is not None and _identity(self._path) == self._identity:
                self._path.unlink()
        self._identity = None
        with contextlib.suppress(OSError):  # while locked: no other process must lock a file that goes
            if _identity(self._lock_path) == _identity_of(os.fstat(self._lock)):
                self._lock_path.unlink()
        os.close(self._lock)
        self._lock = None


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _locked(path: Path, lock: Callable[[int], bool]) -> int:
    """Return the descriptor of a lock file that this process holds the lock of."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor, path, lock)
            if os.path.exists(path) and _identity(path) == _identity_of(os.fstat(descriptor)):  # noqa: PTH110
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has removed it meanwhile


def _lock(descriptor: int, path: Path, lock: Callable[[int], bool]) -> None:
    try:
        locked = lock(descriptor)
    except BlockingIOError:
        raise OSError(errno.EADDRINUSE, "another server listens there", str(path)) from None
    if not locked:
        _log.warning("%s: this file system has no locks; two servers that start at once may take the path", path)


def _check_free(path: Path) -> None:
    """Raise OSError unless the path is free, or a socket without a listener."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except (BlockingIOError, TimeoutError):
            pass  # its backlog is full
    raise OSError(errno.EADDRINUSE, "another server listens there", str(path))


def _identity(path: Path) -> tuple[int, int, int]:
    return _identity_of(path.lstat())


def _identity_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_mtime_ns  # a freed inode may be used again at once
