"""Compiled kernels on disk, so that a start needn't compile them again.

Numba's own cache, in a folder for each combination of what compiled code depends on: the sources, the versions, and the
processor. Numba by itself would neither notice a change in another file that a kernel calls into, nor keep two
processors apart that write at the same time. Files appear by renaming, and all that are in one folder are the same, so
processes may share it. They are pickles: a folder that others can write to isn't used.
"""

import hashlib
import inspect
import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import cfunc

_log = logging.getLogger(__name__)


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
    if folder is not None:
        try:
            with _numba_cache(folder):
                return cfunc(signature, cache=True, **options)(function)
        except Exception as error:  # a full disk, a damaged file, …: whatever it is, compiling helps
            _log.warning("compiled kernels not cached in %s: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)  # the next start writes it anew
    return cfunc(signature, **options)(function)


def cache_folder(key: str) -> Path | None:
    """Return the folder for a key, made if missing; None where there is none that is ours alone.

    It lies below NUMBA_CACHE_DIR or, where that isn't set, below the user's cache folder.
    """
    try:
        folder = _base() / "bilm-serve-kernels" / key
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _log.debug("compiled kernels not cached: %s", error)
        return None
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ours = not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not others_write)
    return folder if ours and os.access(folder, os.W_OK | os.X_OK) else None


def _base() -> Path:
    named = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else Path.home() / ".cache"


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
    versions = (numba.__version__, llvmlite.__version__, sys.version, numba.config.OPT)
    return hashlib.sha256(repr((sources, versions, compiled_for or processor())).encode()).hexdigest()[:32]


@contextmanager
def _numba_cache(folder: Path) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
