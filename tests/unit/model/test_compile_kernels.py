"""The kernels as they are compiled for GPUs that aren't here: instructions, registers, shared memory, and keys."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bilm_model.kernels.kernel_cache import CachedKernels, keep_triton_kernels

from tests.parity.test_cuda import WIDE

pytestmark = pytest.mark.slow  # half a minute of compiling

ROOT = Path(__file__).parents[3]
REGISTERS, SHARED, SHARED_OF_THE_SYSTEM = 65_536, 227 * 1024, 1024
"""Of a multiprocessor of sm_90, and what it needs of that for each program."""


@dataclass(frozen=True)
class Compiled:
    name: str
    metadata: dict[str, Any]
    instructions: str
    resources: dict[str, int]

    @property
    def spilled_words(self) -> int:
        return self.resources["STACK"] // 4


def run(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def compile_into(folder: Path, capabilities: Sequence[int], projections: Sequence[int]) -> None:
    sizes = ("--capability", *map(str, capabilities), "--projection", *map(str, projections))
    run(sys.executable, "-m", "bilm_model.engine.cuda.compile_kernels", folder, *sizes)


def kernels_in(folder: Path) -> list[Compiled]:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    tools, found = Path(triton.__file__).parent / "backends/nvidia/bin", []
    for cubin in folder.rglob("*.cubin"):
        resources = re.findall(r"\b([A-Z]+):(\d+)", run(tools / "cuobjdump", "-res-usage", cubin))
        metadata = json.loads(cubin.with_suffix(".json").read_text())
        sizes = {name: int(size) for name, size in resources}
        found.append(Compiled(cubin.stem, metadata, run(tools / "nvdisasm", "-c", cubin), sizes))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of an H100, of the original size and of the tests' model."""
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = tmp_path_factory.mktemp("triton")
    compile_into(folder, [90], [512, WIDE.projection_dim])
    return folder


@pytest.fixture(scope="module")
def kernels(folder: Path) -> list[Compiled]:
    return kernels_in(folder)


def test_the_fused_kernel_uses_tensor_cores_and_two_programs_share_a_multiprocessor(kernels: list[Compiled]) -> None:
    fused = [kernel for kernel in kernels if kernel.name == "cells_kernel"]
    # Of the check and of two models, for few rows and for many, whose instructions are those of four warps
    assert sorted("HGMMA.64x128x16" in kernel.instructions for kernel in fused) == [False] * 3 + [True] * 3
    for kernel in fused:
        assert re.search(r"\bHG?MMA", kernel.instructions)
        assert "MUFU.TANH" in kernel.instructions
        assert kernel.spilled_words <= 32
        n_threads, shared = 32 * kernel.metadata["num_warps"], kernel.metadata["shared"]
        registers = -(-kernel.resources["REG"] // 8) * 8  # in eights
        assert 2 * registers * n_threads <= REGISTERS
        assert 2 * (shared + SHARED_OF_THE_SYSTEM) <= SHARED


def test_the_check_at_the_start_needs_what_those_that_serve_do(kernels: list[Compiled]) -> None:
    """A GPU with too little shared memory fails the check, and torch's operators compute."""
    shared = sorted(kernel.metadata["shared"] for kernel in kernels if kernel.name == "cells_kernel")
    smaller, few, few_of_the_check, many, many_of_the_check = shared[1:]
    assert smaller < few == few_of_the_check < many == many_of_the_check


def test_the_other_kernels_have_accesses_as_wide_as_there_are(kernels: list[Compiled]) -> None:
    others = [kernel for kernel in kernels if kernel.name != "cells_kernel"]
    assert {kernel.name for kernel in others} == {"gates_kernel", "outputs_kernel"}
    for kernel in others:
        assert kernel.spilled_words == 0
    for name in ("gates_kernel", "outputs_kernel"):
        of_models = [kernel.instructions for kernel in others if kernel.name == name]
        assert any(re.search(r"LDG\.E\.128", each) and re.search(r"STG\.E\.128", each) for each in of_models)
    # The gates alone are computed in float32
    assert not any("MUFU.TANH" in kernel.instructions for kernel in others)


def test_a_run_finds_what_was_compiled_before(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    launched = run(sys.executable, "-m", "tests.support.kernel_runs", folder, "90")
    # In each format: four of the check, which ends where its first numbers are wrong, and two of each of three ticks
    assert int(launched) == 2 * (4 + 3 * 2)
    assert sorted(folder.rglob("*")) == before


def test_a_server_finds_what_was_shipped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    shipped.mkdir(0o755)
    (shipped / "triton").symlink_to(folder)
    keep_triton_kernels(CachedKernels(own, shipped))
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    before = sorted(cache.rglob("*"))
    assert before
    assert int(run(sys.executable, "-m", "tests.support.kernel_runs", cache, "90")) > 0
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("capability", [80, 86, 89, 100])
def test_other_gpus(capability: int, tmp_path: Path) -> None:
    compile_into(tmp_path, [capability], [512])
    fused = [kernel for kernel in kernels_in(tmp_path) if kernel.name == "cells_kernel"]
    assert len(fused) == 4
    for kernel in fused:
        assert re.search(r"\b(UTC)?HMMA", kernel.instructions)
        assert kernel.spilled_words <= 32
