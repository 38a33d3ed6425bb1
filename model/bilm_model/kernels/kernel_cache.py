"""Compiled kernels on disk, so that a start needn't compile them again.

Numba's own cache, in a folder for each kernel and each combination of what compiled code depends on: the sources, the
versions, and the processor. Numba by itself would neither notice a change in another file that a kernel calls into, nor
keep two processors apart that write at the same time. Files appear by renaming, and all that were ever in one folder
compute the same, so processes may share it.

The files hold pickles and machine code: what another user wrote would run here, and a damaged byte ends the process. So
the folder and all above it must be closed to other users, and nothing is read that doesn't have the checksum that was
written after it.
"""

import functools
import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from bilm_system.files import message, private_folder, write_text
from numba import cfunc

_log = logging.getLogger(__name__)

_CHECKSUM = "checksum"


def compiled(signature: Any, options: dict[str, Any], function: Callable[..., Any], *used: ModuleType) -> Any:
    """Return a C function, from the cache if possible.

    Args:
        signature: its type.
        options: of `numba.cfunc`.
        function: what to compile; without a closure, whose content Numba can't compare.
        used: other modules that it calls into.
    """
    key = cache_key(function, used)
    folder = None if key is None else cache_folder(key)
    if folder is None:
        return cfunc(signature, **options)(function)
    try:
        checksum, written = _checksum(folder), _written_checksum(folder)
        if checksum != written:
            if written:  # otherwise another process is just writing, or was ended before it had written everything
                _log.warning("compiled kernel in %s is damaged: removed, compiling it again", folder)
            _remove_files(folder)
        with _numba_cache(folder):
            kernel = cfunc(signature, cache=True, **options)(function)
        if (found := _checksum(folder)) != checksum:
            write_text(folder / _CHECKSUM, found)
    except Exception as error:  # a full disk, a file that can't be read, …: whatever it is, compiling helps
        _log.warning("compiled kernel not kept in %s: %s", folder, error)
        return cfunc(signature, **options)(function)
    return kernel


def cache_folder(key: str) -> Path | None:
    """Return the folder for a key, made if missing; None where there is none that is closed to other users.

    It lies below NUMBA_CACHE_DIR or, where that isn't set, below the user's cache folder.
    """
    try:
        root = _root(_base())
        return None if root is None else private_folder(root / key)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _log.debug("compiled kernel not kept: %s", error)
        return None


def _base() -> Path:
    named = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else Path.home() / ".cache"


@functools.cache
def _root(base: Path) -> Path | None:
    try:
        return private_folder(base / "bilm-serve-kernels")
    except OSError as error:
        _log.info("compiled kernels are not kept, so each start compiles them: %s", message(error))
        return None


def _checksum(folder: Path) -> str:
    """Return a hash of all files that Numba keeps, "" if there are none."""
    files = _files(folder)
    contents = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(repr(contents).encode()).hexdigest() if files else ""


def _written_checksum(folder: Path) -> str:
    path = folder / _CHECKSUM
    return path.read_text(encoding="ascii", errors="replace") if path.exists() else ""


def _remove_files(folder: Path) -> None:
    for path in (*_files(folder), folder / _CHECKSUM):
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """Return what Numba keeps: in a folder named after the source's place, with temporary files beside it."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc"))


def processor() -> tuple[str | None, ...]:
    """Return the processor, and the one that Numba's settings name instead."""
    found = (llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    return (*found, numba.config.CPU_NAME, numba.config.CPU_FEATURES)


def cache_key(
    function: Callable[..., Any], used: Sequence[ModuleType], compiled_for: tuple[str | None, ...] | None = None
) -> str | None:
    """Return a hash of what the machine code depends on; None where a module's source isn't there.

    Args:
        function: compiled.
        used: modules that it calls into, beside its own.
        compiled_for: see `processor`; None: this one.
    """
    try:
        sources = [inspect.getsource(module) for module in (sys.modules[function.__module__], *used)]
    except (OSError, TypeError):
        return None
    kernel = f"{function.__module__}.{function.__qualname__}"
    versions = (numba.__version__, llvmlite.__version__, sys.version, numba.config.OPT)
    return hashlib.sha256(repr((kernel, sources, versions, compiled_for or processor())).encode()).hexdigest()[:32]


@contextmanager
def _numba_cache(folder: Path) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
