"""`python -m benchmarks.gpu_check`: everything that only a GPU can show, in ten minutes at most.

Stages run one after another, each in a separate process under a time limit; what each has found is written when it
ends, so a run that is cut short loses one stage. Without a GPU (`--device cpu`) each stage runs at a tiny size on CPU
tensors, which shows that the script itself works. BILM_TEST_DATA names the folder with the texts. How to prepare a
machine without a network: docs/gpu-check.md.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bilm_model.device import resolve_device
from bilm_model.errors import ModelError
from bilm_system.files import message, write_bytes
from bilm_system.terminal import run_command

from benchmarks.gpu.setting import Facts, Setting
from benchmarks.paths import RESULTS, ROOT

_TESTS, _NUMBERS = 2, 3
_WHOLE_RUN_S = 570.0  # of a machine that lends 600 s a command
_ON_A_CPU = 5  # times the limits: its numbers mean nothing, and it may be busy
_STOP_S = 5.0
_TAIL = 2000  # characters of a failed stage's output that are kept


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Attributes:
        title: for people to read.
        function: "module:name" below `benchmarks.gpu`, takes a `Setting` and returns facts.
        limit_s: after which the stage is killed.
    """

    title: str
    function: str
    limit_s: float

    def load(self) -> Callable[[Setting], Facts]:
        """Import and return the function: a stage that can't be imported is one that fails."""
        module, _, name = self.function.partition(":")
        found: Callable[[Setting], Facts] = getattr(import_module(f"benchmarks.gpu.{module}"), name)
        return found


STAGES: Mapping[int, Stage] = {
    0: Stage("versions, compiler, headers, cache", "device_facts:versions", 30.0),
    1: Stage("products, copies, launches, waking up", "device_facts:primitives", 60.0),
    2: Stage("tests that need a GPU", "numbers:gpu_tests", 180.0),
    3: Stage("the model that ships against float64; bfloat16; company", "numbers:precision", 120.0),
    4: Stage("cold and warm start, memory", "service:starts", 120.0),
    5: Stage("steady load, and a profile by kernel", "speed:steady", 180.0),
    6: Stage("a sentence alone", "speed:alone", 60.0),
    7: Stage("ways to compute a tick, against one another", "speed:ways", 90.0),
    8: Stage("compute-sanitizer on a tiny engine", "faults:sanitizer", 120.0),
    9: Stage("a device assert and an out-of-memory", "faults:device_errors", 90.0),
    10: Stage("served load, and training", "service:load_and_training", 120.0),
}


def main() -> None:
    """Run the stages, or one of them in this process."""
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)  # by an exception, so that a stage under way is ended, too
    try:
        setting = Setting(resolve_device(arguments.device))
        arguments.out.mkdir(parents=True, exist_ok=True)
    except ModelError as error:
        raise SystemExit(f"--device: {error}") from error
    except OSError as error:
        raise SystemExit(f"--out: {message(error)}") from error
    if arguments.one is not None:
        facts = STAGES[arguments.one].load()(setting)
        _write(arguments.out / f"stage-{arguments.one}.json", facts)
        return
    if not run_all(arguments.stages or tuple(STAGES), setting, arguments):
        raise SystemExit(1)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError(text)
    return seconds


RunStage = Callable[[int, float, Setting, Path], Facts]
"""Runs a stage, by its number, within so many seconds; JSON goes to a folder."""


def run_all(
    stages: Sequence[int], setting: Setting, arguments: argparse.Namespace, run: RunStage | None = None
) -> bool:
    """Run stages within the time there is; return whether all ran and succeeded."""
    run = run or run_stage
    end_s, found = time.monotonic() + arguments.limit_s, dict[str, Facts]()
    for number in stages:
        if number > _NUMBERS and found.get(str(_TESTS), {}).get("failed"):
            found[str(number)] = {"left_out": "the tests that need a GPU are red: mend them first"}
        elif (left_s := end_s - time.monotonic()) < 1:
            found[str(number)] = {"left_out": f"{arguments.limit_s:g} s are over"}
        else:
            limit_s = STAGES[number].limit_s * (1 if setting.on_gpu else _ON_A_CPU)
            found[str(number)] = run(number, min(left_s, limit_s), setting, arguments.out)
        print(f"{number:2} {STAGES[number].title}: {_summary(found[str(number)])}", flush=True)
        _write(arguments.out / "gpu_check.json", {"device": str(setting.device), "stages": found})
    return not any("failed" in facts or "left_out" in facts for facts in found.values())


def run_stage(number: int, limit_s: float, setting: Setting, out: Path, command: Sequence[str] | None = None) -> Facts:
    """Run a stage, or what is given instead, in a separate process group, and end what it leaves behind."""
    path = out / f"stage-{number}.json"
    path.unlink(missing_ok=True)
    module, flags = [sys.executable, "-m", "benchmarks.gpu_check"], ["--device", str(setting.device), "--out", str(out)]
    command = command or [*module, "--one", str(number), *flags]
    begun_s = time.monotonic()
    with (out / f"stage-{number}.log").open("w+b") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = f"killed after {limit_s:.0f} s"
        finally:
            _end(process)
        log.seek(0)
        written = log.read().decode(errors="replace")
    facts: Facts = json.loads(path.read_bytes()) if path.exists() else {}
    facts["seconds"] = round(time.monotonic() - begun_s, 1)
    if code != 0:
        facts |= {"failed": f"exit {code}", "output": written[-_TAIL:]}
    return facts


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_STOP_S)
        except ProcessLookupError:  # the whole group has ended
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _summary(facts: Facts) -> str:
    if "left_out" in facts:
        return f"left out: {facts['left_out']}"
    state = f"FAILED ({facts['failed']})" if facts.get("failed") else "done"
    parts = [f"{name} {value}" for name, value in facts.items() if isinstance(value, str | int | float)]
    return f"{state}; " + ", ".join(part for part in parts if not part.startswith(("failed", "output")))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, json.dumps(content, indent=1).encode())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = "; ".join(f"{number}: {stage.title}" for number, stage in STAGES.items())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, metavar="N", help=stages)
    parser.add_argument("--limit-s", type=_seconds, default=_WHOLE_RUN_S, help="for all stages (%(default)g)")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu-check", help="folder for the JSON (%(default)s)")
    parser.add_argument("--one", type=int, choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.gpu_check", main))
