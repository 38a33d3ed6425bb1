"""Golden vectors and bits on smaller instruction sets than the machine's own, each in a process that starts limited.

AVX2 in every run of the suite; all the sets that the machine has in the slow one.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 1800

CORE = (
    "tests/parity/test_golden.py",
    "tests/parity/test_oracle.py::test_bfloat16_products_stay_close",
    "tests/parity/test_company.py::test_random_schedules[odd sizes-float32-None]",
    "tests/parity/test_company.py::test_random_schedules[odd sizes-bfloat16-None]",
)
ALL = (
    "tests/parity/test_golden.py",
    "tests/parity/test_oracle.py",
    "tests/parity/test_company.py",
    "tests/parity/test_bfloat16.py",
    "tests/unit/model/test_elementwise.py",
    "tests/unit/model/test_machines.py",
    "tests/unit/model/test_product_paths.py",
    "tests/unit/model/test_products.py",
    "tests/unit/training/test_machines.py",
    "tests/unit/training/test_unrolled.py",
)
"""Tests whose numbers depend on the instructions."""

PROGRAM = """
import sys
import pytest, torch
from numba.core.registry import cpu_target
from bilm_model.kernels.product_paths import has_bfloat16_products

capability, knows_bfloat16, processor = sys.argv[1:4]
assert torch.backends.cpu.get_cpu_capability() == capability, torch.backends.cpu.get_cpu_capability()
assert has_bfloat16_products() == (knows_bfloat16 == "True"), "oneDNN doesn't keep to its limit"
assert cpu_target.target_context.codegen().magic_tuple()[1] == processor
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[4:]]))
"""


@dataclass(frozen=True)
class InstructionSet:
    """What limits a process to a set.

    Attributes:
        flag: of /proc/cpuinfo, which the machine must have; the sets below it, too.
        onednn: ONEDNN_MAX_CPU_ISA.
        torch: ATEN_CPU_CAPABILITY.
        numba: NUMBA_CPU_NAME.
        bfloat16: whether oneDNN computes bfloat16 products there, native or emulated.
    """

    flag: str
    onednn: str
    torch: str
    numba: str
    bfloat16: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """The variables, over the present ones without pytest's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return kept | {
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.torch,
            "NUMBA_CPU_NAME": self.numba,
            "NUMBA_CPU_FEATURES": "",  # those of the name
        }


AVX2 = InstructionSet("avx2", "AVX2", "avx2", "haswell")
SETS = [
    InstructionSet("sse4_1", "SSE41", "default", "nehalem"),
    AVX2,
    InstructionSet("avx_vnni", "AVX2_VNNI", "avx2", "alderlake"),
    InstructionSet("avx_ne_convert", "AVX2_VNNI_2", "avx2", "sierraforest", bfloat16=True),
    InstructionSet("avx512dq", "AVX512_CORE", "avx512", "skylake-avx512", bfloat16=True),
    InstructionSet("avx512_vnni", "AVX512_CORE_VNNI", "avx512", "cascadelake", bfloat16=True),
    InstructionSet("avx512_bf16", "AVX512_CORE_BF16", "avx512", "cooperlake", bfloat16=True),
    InstructionSet("avx512_fp16", "AVX512_CORE_FP16", "avx512", "sapphirerapids", bfloat16=True),
    InstructionSet("amx_bf16", "AVX512_CORE_AMX", "avx512", "sapphirerapids", bfloat16=True),
]


def machine_flags() -> set[str]:
    """What the processor has, by the kernel's word; nothing where it isn't Linux on x86."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def run_limited(limit: InstructionSet, tests: tuple[str, ...]) -> None:
    if limit.flag not in machine_flags():
        pytest.skip(f"needs a processor with {limit.flag} (Linux on x86)")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("needs a torch with oneDNN")
    facts = (limit.torch.upper(), str(limit.bfloat16), limit.numba)
    command = [sys.executable, "-c", PROGRAM, *facts, *tests]
    done = subprocess.run(
        command, cwd=ROOT, env=limit.environment, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )
    assert done.returncode == 0, f"{limit}:\n{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout, done.stdout


def test_golden_vectors_and_bits_on_avx2() -> None:
    run_limited(AVX2, CORE)


@pytest.mark.slow
@pytest.mark.parametrize("limit", SETS, ids=lambda limit: limit.onednn)
def test_everything_numeric_on_every_set_of_the_machine(limit: InstructionSet) -> None:
    run_limited(limit, ALL)
