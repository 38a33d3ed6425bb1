"""The key of a kept kernel covers every file that its machine code is made of: or another version's code would run."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

PROJECT = "bilm_model."
PROGRAM = """
import json
import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cpu.fastest import fastest_elementwise
from bilm_model.engine.options import EngineOptions
from bilm_model.kernels.kernel_cache import CachedKernels, use_store

found = []

class Noting(CachedKernels):
    def find(self, request):
        used = [module.__name__ for module in request.used]
        found.append((request.function.__module__, request.function.__qualname__, used))
        return super().find(request)

use_store(Noting())
fastest_elementwise(torch.bfloat16)
for precision in ("float32", "bfloat16"):
    CellularBatch(random_bilm(SIZES["tiny"]), torch.device("cpu"), EngineOptions(precision))
print(json.dumps(found))
"""


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def function_of(found: Any) -> FunctionType | None:
    """Return the Python function behind what Numba has made of it, or another's wrapper has."""
    for name in ("py_func", "_defn", "__wrapped__"):
        found = getattr(found, name, found)
    return found if isinstance(found, FunctionType) else None


def referred(function: FunctionType) -> Iterator[Any]:
    """Yield what a function's globals and closure have under the names in its code."""
    for code in codes(function.__code__):
        for name in code.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]
            yield from (
                getattr(module, name)
                for module in function.__globals__.values()
                if isinstance(module, ModuleType) and module.__name__.startswith(PROJECT) and hasattr(module, name)
            )
    yield from (cell.cell_contents for cell in function.__closure__ or ())


def modules_of(function: FunctionType) -> set[str]:
    """Return the modules of ours whose functions a function is compiled with, its own included."""
    waiting, seen = [function], {function}
    while waiting:
        for found in map(function_of, referred(waiting.pop())):
            if found is not None and found.__module__.startswith(PROJECT) and found not in seen:
                seen.add(found)
                waiting.append(found)
    return {each.__module__ for each in seen}


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, str, list[str]]]:
    """Module, function and used modules of every kernel of an engine."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    return [(module, function, used) for module, function, used in json.loads(done.stdout)]


def test_every_module_that_a_kernel_is_made_of_is_part_of_its_key(requests: list[tuple[str, str, list[str]]]) -> None:
    assert len(requests) > 5
    for module, name, used in requests:
        function = function_of(getattr(importlib.import_module(module), name))
        assert function is not None
        missing = modules_of(function) - {module, *used} - {"bilm_model.kernels.kernel_cache"}
        assert not missing, f"{module}.{name} is compiled with {missing}"


def test_what_would_be_found() -> None:
    from bilm_model.engine.cpu import cell_kernel, fused_elementwise

    assert modules_of(function_of(fused_elementwise._lstm_float32)) >= {"bilm_model.kernels.cells"}  # type: ignore[arg-type]
    assert modules_of(function_of(cell_kernel._run_in_team)) >= {"bilm_model.engine.cpu.panels"}  # type: ignore[arg-type]
