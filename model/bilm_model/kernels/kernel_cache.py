"""Compiled kernels on disk, so that a start needn't compile them again.

A file for each kernel and each combination of what its machine code depends on: the sources, the versions, and the
processor. Files appear by renaming, and any two of one name compute the same, so processes may share a folder.

They hold machine code: what another user wrote would run here, and a damaged byte ends the process. So the folder and
all above it must be closed to other users, and no code is loaded whose checksum differs.

Beside the user's own folder there may be one with kernels that were shipped (`bilm_model.shipped_kernels`), which
nobody but its owner, root or this user, can write to. Those are compiled for a level of instruction sets, not for one
processor; the user's own come first.
"""

import functools
import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import llvmlite
import llvmlite.binding as llvm
import numba
from bilm_system.files import message, private_folder, protected_folder, write_bytes
from numba import cfunc

from bilm_model.kernels.instruction_levels import level_of
from bilm_model.kernels.machine_code import LoadedKernel, MachineCode, MachineCodeError

_log = logging.getLogger(__name__)

_SUFFIX = ".kernel"
_TRITON = "triton"


@dataclass(frozen=True, eq=False)
class KernelRequest:
    """A kernel that is needed.

    Attributes:
        signature: its type.
        options: of `numba.cfunc`.
        function: what is compiled.
        used: modules that it calls into, beside its own.
    """

    signature: Any
    options: dict[str, Any]
    function: Callable[..., Any]
    used: tuple[ModuleType, ...]

    @property
    def name(self) -> str:
        """Full name of the function."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


class KernelStore(Protocol):
    """Where kernels are kept."""

    def find(self, request: KernelRequest) -> LoadedKernel | None:
        """Return a kernel that was kept; None if it has to be compiled."""

    def keep(self, request: KernelRequest, kernel: Any) -> None:
        """Keep a kernel that has been compiled, if possible."""


def compiled(
    signature: Any,
    options: dict[str, Any],
    function: Callable[..., Any],
    *used: ModuleType,
    store: KernelStore | None = None,
) -> Any:
    """Return a C function, from where kernels are kept if possible.

    Args:
        signature: its type.
        options: of `numba.cfunc`.
        function: what to compile; without a closure, whose content is no part of the key.
        used: other modules that it calls into.
        store: where it is kept; None: where `use_store` says.
    """
    request, store = KernelRequest(signature, options, function, used), store or _present.store
    found = store.find(request)
    if found is not None:
        return found
    kernel = cfunc(signature, **options)(function)
    store.keep(request, kernel)
    return kernel


class CachedKernels:
    """Kernels in a folder of this user's, and those that were shipped (`KernelStore`)."""

    def __init__(self, folder: Path | None = None, shipped: Path | None = None) -> None:
        """Keep where to look; nothing is read or made before the first kernel is needed.

        Args:
            folder: of this user's; None: `default_folder`.
            shipped: None: below the installation.
        """
        self._named = folder
        self._shipped = shipped_folder() if shipped is None else shipped
        self._problem = ""
        self._warned = False

    @functools.cached_property
    def folder(self) -> Path | None:
        """The user's own folder, made if missing; None where it isn't closed to other users, or can't be made."""
        try:
            return private_folder(self._named or default_folder())
        except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
            self._problem = message(error) if isinstance(error, OSError) else str(error)
            return None

    @functools.cached_property
    def shipped(self) -> Path | None:
        """The folder with shipped kernels; None where there is none, or somebody else could write to it."""
        try:
            return protected_folder(self._shipped)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("shipped kernels not used: %s", message(error))
            return None

    def find(self, request: KernelRequest) -> LoadedKernel | None:
        """See `KernelStore`."""
        if self.folder is not None and (key := cache_key(request.function, request.used)) is not None:
            found = _read(self.folder / f"{key}{_SUFFIX}", request.signature, remove=True)
            if found is not None:
                return found
        level = present_level()
        if self.shipped is None or level is None:
            return None
        key = cache_key(request.function, request.used, (level,))
        return None if key is None else _read(self.shipped / f"{key}{_SUFFIX}", request.signature, remove=False)

    def keep(self, request: KernelRequest, kernel: Any) -> None:
        """See `KernelStore`."""
        key = cache_key(request.function, request.used)
        if self.folder is None:
            self._warn()
        elif key is not None:
            keep_in(self.folder, key, kernel)

    def _warn(self) -> None:
        if not self._warned:
            _log.warning("compiled kernels are not kept, so each start compiles them: %s", self._problem)
        self._warned = True


def default_folder() -> Path:
    """Return the folder for kernels where none is named: below NUMBA_CACHE_DIR, else the user's cache folder.

    Raises:
        RuntimeError: if there is no home folder.
    """
    named = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "bilm-serve"


def keep_triton_kernels(kernels: CachedKernels) -> None:
    """Have Triton keep its kernels below the same folder, by TRITON_CACHE_DIR, unless that is set.

    It finds those there, too, that `engine.cuda.compile_kernels` has put into `triton` below the shipped ones.
    Where there is no folder, Triton does as it does: its own is below the home folder, and what is compiled is needed.
    """
    if "TRITON_CACHE_DIR" in os.environ or kernels.folder is None:
        return
    try:
        folder = private_folder(kernels.folder / _TRITON)
        os.environ["TRITON_CACHE_DIR"] = str(folder)
        if kernels.shipped is not None:
            _refer_to(kernels.shipped / _TRITON, folder)
    except OSError as error:
        _log.warning("Triton's kernels are not kept with the others: %s", message(error))


def _refer_to(shipped: Path, folder: Path) -> None:
    """Copy what says where a kernel's files are: Triton has a folder for each kernel, and such a file in it."""
    for group in shipped.glob("*/__grp__*.json"):
        target = folder / group.parent.name / group.name
        if not target.exists():
            target.parent.mkdir(mode=0o700, exist_ok=True)
            write_bytes(target, group.read_bytes())


def shipped_folder() -> Path:
    """Return where an installation has the kernels that come with it."""
    return Path(sys.prefix) / "share" / "bilm-serve" / "kernels"


def keep_in(folder: Path, key: str, kernel: Any) -> None:
    """Keep a kernel that Numba has compiled under a key; log what keeps it from that."""
    try:
        write_bytes(folder / f"{key}{_SUFFIX}", MachineCode.of(kernel).to_bytes())
    except Exception as error:  # a full disk, another release of Numba, …: it is compiled, that is enough
        _log.warning("compiled kernel not kept in %s: %s", folder, error)


def _read(path: Path, signature: Any, *, remove: bool) -> LoadedKernel | None:
    """Return a kernel from a file; None where there is none, or it can't be used, with a warning."""
    try:
        return MachineCode.from_bytes(path.read_bytes()).load(signature)
    except FileNotFoundError:
        return None
    except (MachineCodeError, OSError, RuntimeError, ValueError, KeyError) as error:
        _log.warning("compiled kernel %s can't be used, compiling it again: %s", path, error)
    if remove:
        path.unlink(missing_ok=True)
    return None


# ---- keys ------------------------------------------------------------------------------------------------------------


@functools.cache
def processor() -> tuple[str | None, ...]:
    """Return the processor, and the one that Numba's settings name instead."""
    found = (llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    return (*found, numba.config.CPU_NAME, numba.config.CPU_FEATURES)


@functools.cache
def present_level() -> str | None:
    """Return the name of this processor's level; None where it has none, or Numba's settings name another processor."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return None
    level = level_of(llvm.get_host_cpu_features())
    return None if level is None else level.name


def cache_key(
    function: Callable[..., Any], used: Sequence[ModuleType], compiled_for: tuple[str | None, ...] | None = None
) -> str | None:
    """Return a hash of what the machine code depends on; None where a module's source isn't there.

    Args:
        function: compiled.
        used: modules that it calls into, beside its own.
        compiled_for: see `processor`; None: this one. Of a level, its name.
    """
    try:
        sources = [_source_hash(module) for module in (sys.modules[function.__module__], *used)]
    except (OSError, TypeError):
        return None
    kernel = f"{function.__module__}.{function.__qualname__}"
    versions = (numba.__version__, llvmlite.__version__, sys.version, numba.config.OPT)
    return hashlib.sha256(repr((kernel, sources, versions, compiled_for or processor())).encode()).hexdigest()[:32]


@functools.cache
def _source_hash(module: ModuleType) -> str:
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


# ---- the store of the process ----------------------------------------------------------------------------------------


class _Present:
    """The process's store. Kernels are the process's, too: compiled once, when their module is imported or needed."""

    def __init__(self) -> None:
        self.store: KernelStore = CachedKernels()


_present = _Present()


def use_store(store: KernelStore) -> KernelStore:
    """Keep kernels in another store from here on; return the one before."""
    before, _present.store = _present.store, store
    return before
