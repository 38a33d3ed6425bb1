"""The check on a GPU, on a machine without one: what its stages share; `make test-slow` runs them all."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu.setting import Setting
from benchmarks.gpu_check import STAGES

ROOT = Path(__file__).parents[3]
SETTING = Setting(torch.device("cpu"))


def arguments(out: Path, limit_s: float = 100.0) -> argparse.Namespace:
    return argparse.Namespace(out=out, limit_s=limit_s)


def found_in(out: Path) -> dict[str, dict[str, object]]:
    stages: dict[str, dict[str, object]] = json.loads((out / "gpu_check.json").read_bytes())["stages"]
    return stages


def test_every_stage_can_be_loaded() -> None:
    assert list(STAGES) == list(range(11))
    assert all(callable(stage.load()) for stage in STAGES.values())


def test_after_red_tests_only_the_numbers_are_looked_at(tmp_path: Path) -> None:
    ran = []

    def run(number: int, limit_s: float, setting: Setting, out: Path) -> dict[str, object]:
        ran.append(number)
        return {"failed": "pytest ended with 1"} if number == 2 else {}

    assert not gpu_check.run_all((2, 3, 5), SETTING, arguments(tmp_path), run)
    assert ran == [2, 3]
    assert "left_out" in found_in(tmp_path)["5"]


def test_what_is_left_of_the_time_bounds_a_stage(tmp_path: Path) -> None:
    limits = []

    def run(number: int, limit_s: float, setting: Setting, out: Path) -> dict[str, object]:
        limits.append(limit_s)
        return {}

    assert gpu_check.run_all((0,), SETTING, arguments(tmp_path, 12.0), run)
    assert 11.0 < limits[0] <= 12.0
    assert not gpu_check.run_all((0, 1), SETTING, arguments(tmp_path, 0.5), run)
    assert len(limits) == 1
    assert "left_out" in found_in(tmp_path)["1"]


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])"
    facts = gpu_check.run_stage(4, 1.0, SETTING, tmp_path, [sys.executable, "-c", child])
    assert facts["failed"] == "exit killed after 1 s"


def test_a_stage_that_fails_says_why(tmp_path: Path) -> None:
    facts = gpu_check.run_stage(4, 20.0, SETTING, tmp_path, [sys.executable, "-c", "raise SystemExit('no such thing')"])
    assert facts["failed"] == "exit 1"
    assert "no such thing" in facts["output"]


def test_versions(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--stages", "0", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f" 0 {STAGES[0].title}: done; python ")
    assert found_in(tmp_path)["0"]["torch"] == torch.__version__


@pytest.mark.parametrize("flags", [("--device", "foo"), ("--limit-s", "nan"), ("--out", "/dev/null/x")])
def test_wrong_flags_are_told_in_a_line(flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stages", "0", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (1, 2)
    assert flags[0] in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("corpora")
def test_all_stages_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--limit-s", "1500"]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True)
    found = found_in(tmp_path)
    assert list(found) == list(map(str, STAGES))
    assert not [number for number, facts in found.items() if "left_out" in facts or "failed" in facts]


def test_tests_that_need_a_gpu_are_collected_without_plugins() -> None:
    without = [part for name in ("asyncio", "timeout", "xdist", "hypothesispytest") for part in ("-p", f"no:{name}")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *without, "tests/parity"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_gpu_the_model_that_ships[float32" in run.stdout
