"""Stages 4 and 10: how the service starts on the device, what it serves there, and how fast it learns."""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from bilm_client.testing.server import ServerProcess

from benchmarks.gpu.setting import Facts, Setting
from benchmarks.load.load import LoadGenerator
from benchmarks.paths import ROOT
from benchmarks.process_usage import memory_mib

_START_S = 100.0
_SENTENCES = 512
_CALLERS, _WARM_S, _WINDOW_S = 64, 2.0, 8.0
_TRAINING = ("-m", "benchmarks.experiments.training", "--rounds", "2")
_TINY = ("--preset", "mini", "--windows", "1", "--rounds", "1")


def starts(setting: Setting) -> Facts:
    """Return the seconds to SERVING with no kernels kept and with those of the start before, and what memory it takes.

    The first start of all, uncounted, reads the libraries from the disk.
    """
    facts: Facts = {}
    with tempfile.TemporaryDirectory(prefix="bilm-gpu-check-") as name:
        for size in setting.sizes:
            _start(setting, size, Path(name) / "uncounted")
            for kind in ("cold", "warm"):
                facts[f"{size} {kind}"] = _start(setting, size, Path(name) / size)
    return facts


def load_and_training(setting: Setting) -> Facts:
    """Return tokens a second through the server, one and 32 sentences a call; and those learnt a second."""
    facts: Facts = {}
    callers, warm_s, window_s = (_CALLERS, _WARM_S, _WINDOW_S) if setting.on_gpu else (4, 0.1, 0.5)
    size = setting.sizes[-1]
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(f"random:{size}", _flags(setting), _START_S))
        generator = stack.enter_context(LoadGenerator(server.target, _SENTENCES))
        for per_call in (1, 32):
            found = generator.closed(callers, per_call, warm_s, window_s)
            rate = found["tokens"] / found["seconds"]
            facts[f"{size}, {callers} callers, {per_call} a call: tokens_per_s"] = rate
    with tempfile.TemporaryDirectory(prefix="bilm-gpu-check-") as name:
        out = Path(name) / "training.json"
        command = [sys.executable, *_TRAINING, "--device", str(setting.device), "--out", str(out)]
        command += [] if setting.on_gpu else _TINY
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(run.stdout, run.stderr, sep="\n")
        if run.returncode != 0:
            facts["failed"] = f"training ended with {run.returncode}"
        else:
            facts["training"] = json.loads(out.read_bytes())["figures"]
    return facts


def _start(setting: Setting, size: str, cache: Path) -> Facts:
    free_before = torch.cuda.mem_get_info(setting.device)[0] if setting.on_gpu else 0
    begun_s = time.monotonic()
    arguments = (*_flags(setting), "--kernel-cache", str(cache))
    with ServerProcess(f"random:{size}", arguments, _START_S) as server:
        facts: Facts = {"serving_s": time.monotonic() - begun_s, "host_mib": memory_mib(server.process_id)}
        if setting.on_gpu:
            facts["gpu_mib"] = (free_before - torch.cuda.mem_get_info(setting.device)[0]) / 2**20
    return facts


def _flags(setting: Setting) -> tuple[str, ...]:
    return ("--device", str(setting.device), "--log-level", "warning")
