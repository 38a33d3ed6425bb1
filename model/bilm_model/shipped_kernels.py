"""`python -m bilm_model.shipped_kernels FOLDER`: the kernels that an installation ships, for each instruction level.

What a server on the model that ships needs is found out by building its engine here, in each precision. The kernels are
then compiled for every level in a process of its own, and not run: the machine that builds need not have the level.
"""

import argparse
import base64
import importlib
import os
import pickle
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bilm_model.bilm import Bilm
from bilm_model.device import resolve_device
from bilm_model.engine.backend import Memory
from bilm_model.engine.backends import NewBackend, new_backend
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.cpu.fastest import fastest_elementwise
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.state import LstmStateCodec
from bilm_model.kernels.instruction_levels import LEVELS
from bilm_model.kernels.kernel_cache import KernelRequest, cache_key, compiled, keep_in, use_store
from bilm_model.kernels.machine_code import LoadedKernel
from bilm_model.kernels.product_paths import Precision
from bilm_model.weights.loading import load

_MODE = 0o755
_MACHINES = ("x86_64", "AMD64")


@dataclass(frozen=True)
class _Recorded:
    """A request as another process can make it.

    Attributes:
        module: of the function.
        function: its qualified name.
        signature: its type.
        options: of `numba.cfunc`.
        used: names of modules.
    """

    module: str
    function: str
    signature: Any
    options: dict[str, Any]
    used: tuple[str, ...]

    @classmethod
    def of(cls, request: KernelRequest) -> "_Recorded":
        function, used = request.function, tuple(module.__name__ for module in request.used)
        return cls(function.__module__, function.__qualname__, request.signature, request.options, used)

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function}"


@dataclass(frozen=True)
class RecordedKernels:
    """Keeps which kernels are asked for, and has each of them compiled (`KernelStore`)."""

    requests: list[_Recorded] = field(default_factory=list)

    def find(self, request: KernelRequest) -> LoadedKernel | None:
        """See `KernelStore`."""
        self.requests.append(_Recorded.of(request))
        return None

    def keep(self, request: KernelRequest, kernel: Any) -> None:
        """See `KernelStore`."""


class BuiltKernels:
    """Keeps kernels that are compiled for a level (`KernelStore`).

    Attributes:
        names: of the functions kept.
    """

    def __init__(self, folder: Path, level: str) -> None:
        """Keep where they go.

        Args:
            folder: for their files.
            level: that Numba compiles for.
        """
        self._folder, self._level = folder, level
        self.names: set[str] = set()

    def find(self, request: KernelRequest) -> LoadedKernel | None:
        """See `KernelStore`."""
        return None

    def keep(self, request: KernelRequest, kernel: Any) -> None:
        """See `KernelStore`."""
        key = cache_key(request.function, request.used, (self._level,))
        assert key is not None  # noqa: S101 - a build has the sources
        keep_in(self._folder, key, kernel)
        self.names.add(request.name)


def needed_kernels() -> list[_Recorded]:
    """Return what a server on the model that ships asks for, in either precision."""
    store = RecordedKernels()
    before = use_store(store)
    try:
        _build_engines()
    finally:
        use_store(before)
    return store.requests


def _build_engines() -> None:
    fastest_elementwise(torch.bfloat16)  # an engine takes these only where bfloat16 products are native
    loaded = load("")
    engines: dict[Precision, NewBackend] = {"float32": new_backend, "bfloat16": _backend_without_tiles}
    for precision, backend in engines.items():
        batch = CellularBatch(loaded.bilm, resolve_device("cpu"), EngineOptions(precision=precision), backend)
        RecurrentEngine(batch, LstmStateCodec(loaded.bilm.config, loaded.version)).warm_up()


def _backend_without_tiles(bilm: Bilm, memory: Memory, options: EngineOptions) -> CpuBackend:
    """Return a back end as machines of the levels have it: the cells' kernel for bfloat16 needs more than these do."""
    cache_bytes, n_rows = options.input_cache_bytes, options.max_rows or 1
    return CpuBackend(bilm, memory, n_rows, cache_bytes, options.products, new_recurrence=lambda lstm, config: None)


def compile_for_level(folder: Path, level: str, requests: list[_Recorded]) -> None:
    """Compile kernels in a process that Numba's settings have compile for a level.

    Raises:
        SystemExit: if one of them was not kept.
    """
    store = BuiltKernels(folder, level)
    use_store(store)
    modules = {request.name: importlib.import_module(request.module) for request in requests}  # some compile by that
    for request in requests:
        if request.name not in store.names:
            function = getattr(modules[request.name], request.function)
            compiled(request.signature, request.options, function, *map(importlib.import_module, request.used))
    if missing := {request.name for request in requests} - store.names:
        sys.exit(f"not compiled for {level}: {', '.join(sorted(missing))}")


def main(argv: list[str] | None = None) -> int:
    """Build the kernels of every level into a folder, which is made if missing."""
    parser = argparse.ArgumentParser(prog="python -m bilm_model.shipped_kernels", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the kernels; made if missing")
    parser.add_argument("--level", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.level:
        requests = pickle.loads(base64.b64decode(sys.stdin.buffer.read()))  # noqa: S301 - from the process that started it
        compile_for_level(arguments.folder, arguments.level, requests)
        return 0
    if platform.machine() not in _MACHINES:
        print(f"no level of instruction sets is known for {platform.machine()}: nothing to build")
        return 0
    arguments.folder.mkdir(mode=_MODE, parents=True, exist_ok=True)
    requests = needed_kernels()
    for level in LEVELS:
        command = [sys.executable, "-m", "bilm_model.shipped_kernels", str(arguments.folder), "--level", level.name]
        environment = {**os.environ, **level.environment}
        subprocess.run(command, input=base64.b64encode(pickle.dumps(requests)), env=environment, check=True)  # noqa: S603 - itself
        n_kernels = len({request.name for request in requests})
        print(f"{level.name}: {n_kernels} kernels in {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
