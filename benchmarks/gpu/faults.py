"""Stages 8 and 9: memory errors of the kernels, and what the service makes of a device that fails."""

import shutil
import subprocess
import sys
import tempfile
import time

from bilm_client import Client, RetryPolicy
from bilm_client.errors import BilmError
from bilm_client.testing.server import wait_until_serving

from benchmarks.gpu.failing_server import ASSERT, MEMORY
from benchmarks.gpu.setting import Facts, Setting
from benchmarks.paths import ROOT

_TINY_ENGINE = """
import sys, torch
from bilm_model.engine.options import EngineOptions
from benchmarks.gpu.setting import Setting
from benchmarks.load.engines import as_engine_sentences
setting = Setting(torch.device(sys.argv[1]))
for precision in ("float32", "bfloat16"):
    batch = setting.batch(setting.bilm("tiny"), EngineOptions(precision, max_rows=8, input_cache_mib=0))
    batch.run(as_engine_sentences(setting.sentences(20)))
setting.synchronize()
"""
_FOUND = 86  # the exit status that the sanitizer is told to use
_ENGINE_LOST = 3  # of bilm-serve
_START_S, _CALL_S, _AT_ONCE_S = 60.0, 70.0, 5.0


def sanitizer(setting: Setting) -> Facts:
    """Run a tiny engine under compute-sanitizer's memcheck; on a CPU, or where there is none, without it."""
    command, tool = [sys.executable, "-c", _TINY_ENGINE, str(setting.device)], shutil.which("compute-sanitizer")
    if setting.on_gpu and tool is not None:
        command = [tool, "--tool", "memcheck", "--error-exitcode", str(_FOUND), *command]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(run.stdout, run.stderr, sep="\n")
    facts: Facts = {"compute_sanitizer": tool if setting.on_gpu else None, "exit": run.returncode}
    if run.returncode != 0:
        facts["failed"] = "the sanitizer found errors" if run.returncode == _FOUND else "the engine failed"
    return facts


def device_errors(setting: Setting) -> Facts:
    """Let a server's device fail: an out-of-memory costs a sentence, an assertion ends the process at once."""
    with tempfile.TemporaryDirectory(prefix="bilm-") as folder:
        target = f"unix:{folder}/bilm.sock"
        flags = ["--model", "random:tiny", "--device", str(setting.device), "--listen", target, "--drain-delay-s", "0"]
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.failing_server", *flags], cwd=ROOT)
        try:
            wait_until_serving(target, process, _START_S)
            with Client(target, retry=RetryPolicy(max_attempts=1), timeout_s=_CALL_S) as client:
                facts: Facts = {"out_of_memory": _ask(client, MEMORY), "afterwards": _ask(client, "the")}
                begun_s = time.monotonic()
                facts["assertion"] = _ask(client, ASSERT)
                facts |= {"exit": process.wait(_CALL_S), "seconds_to_exit": time.monotonic() - begun_s}
        finally:
            process.kill()
            process.wait()
    as_expected = (facts["out_of_memory"], facts["afterwards"], facts["exit"]) == ("INTERNAL", "vectors", _ENGINE_LOST)
    if not as_expected or facts["seconds_to_exit"] > _AT_ONCE_S:
        facts["failed"] = f"expected INTERNAL, vectors and exit {_ENGINE_LOST} within {_AT_ONCE_S:g} s"
    return facts


def _ask(client: Client, word: str) -> str:
    """Return what a sentence with this word ends in."""
    try:
        client.embed([[word, "and", "more"]])
    except BilmError as error:
        return getattr(error, "reason", "") or type(error).__name__
    return "vectors"
