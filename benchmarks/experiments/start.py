"""The start: until the port opens, until the server is SERVING, what memory it has then; and the client's import."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import START_TIMEOUT_S, ServerStartError, wait_until_serving
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.weights import single_file

from benchmarks.experiments.in_process import Effort
from benchmarks.process_usage import memory_mib

OPEN_TARGET, SERVING_TARGET = 0.5, 2.2
"""In times of importing torch."""
PRIVATE_MIB_TARGET, RESIDENT_MIB_TARGET = 230.0, 420.0
IMPORT_TARGET_S = 0.3
_LOOK_INTERVAL_S = 0.005
_SETTLE_S = 3.0  # a server's last threads of its start have ended
_STOP_TIMEOUT_S = 30.0
_IMPORT = """
import time
begun_s = time.process_time()
from bilm_client import AsyncClient, Client
print(time.process_time() - begun_s)
"""


def start_to_serving(report: Findings, effort: Effort, sizes: Sequence[str] = ("default", "original")) -> None:
    """Measure from the process's start, in turns with importing torch; the weights are a file in the page cache.

    Kernels' compilations are kept in a folder that the first, uncounted start fills; a cold start has an empty one.
    """
    with tempfile.TemporaryDirectory(prefix="bilm-bench-") as name:
        folder = Path(name)
        caches = folder / "caches"
        sources = {size: _weights(size, folder) for size in sizes}
        opened: dict[str, list[float]] = {size: [] for size in sizes}

        def start_s(size: str, cache: Path) -> float:
            with started_server(sources[size], cache) as (open_s, serving_s, _):
                opened[size].append(open_s)
            return serving_s

        contestants: dict[str, Contestant] = {"torch": _torch_import_s}
        contestants |= {size: lambda size=size: start_s(size, caches) for size in sizes}  # type: ignore[misc]
        cold = {size: start_s(size, folder / f"cold {size}") for size in sizes}
        interleave(contestants, 1)
        for found_s in opened.values():
            found_s.clear()
        found = interleave(contestants, effort.rounds)
    report.detail("start", {"serving_s": found, "open_s": opened, "cold_serving_s": cold})
    report.add(Finding("start/torch", "importing torch alone", Spread.of(found["torch"]), "s"))
    for size in sizes:
        what = f"{size} {'model' if size == 'default' else 'size'}"
        open_times, times = ratio(opened[size], found["torch"]), ratio(found[size], found["torch"])
        targets = (OPEN_TARGET, SERVING_TARGET) if size == "default" else (None, None)
        report.add(
            Finding(f"start/{size}/open", f"start to an open port, {what}", Spread.of(opened[size]), "s"),
            Finding(f"start/{size}/open/ratio", "  against torch", open_times, "×", targets[0], at_least=False),
            Finding(f"start/{size}", f"start to SERVING, {what}", Spread.of(found[size]), "s"),
            Finding(f"start/{size}/ratio", "  against torch", times, "×", targets[1], at_least=False),
            Finding(f"start/{size}/cold", "  with no compiled kernels kept", Spread.of([cold[size]]), "s"),
        )


def memory_after_start(report: Findings, effort: Effort) -> None:
    """Measure the memory of a server that has just started, with the model that ships."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bilm-bench-") as caches:
        for number in range(effort.rounds + 1):
            with started_server("", Path(caches)) as (_, _, process_id):
                time.sleep(_SETTLE_S)
                if number:  # the first start compiles the kernels
                    found.append(memory_mib(process_id))
    private, resident = ([each[name] for each in found] for name in ("RssAnon", "VmRSS"))
    report.detail("memory after start", {"private_mib": private, "resident_mib": resident})
    what = "after the start, the model that ships"
    report.add(
        Finding("memory/start/private", f"private memory {what}", Spread.of(private), "MiB", PRIVATE_MIB_TARGET, False),
        Finding("memory/start/resident", f"resident {what}", Spread.of(resident), "MiB", RESIDENT_MIB_TARGET, False),
    )


@contextmanager
def started_server(model: str, caches: Path, *arguments: str) -> Iterator[tuple[float, float, int]]:
    """Start a server; give seconds until its port opened, until it was SERVING, and its process.

    Args:
        model: as bilm-serve's --model.
        caches: folder for compiled kernels.
        arguments: further ones.
    """
    with tempfile.TemporaryDirectory(prefix="bilm-") as folder:
        path = f"{folder}/bilm.sock"
        flags = ["--model", model, "--listen", f"unix:{path}", "--drain-delay-s", "0", "--log-level", "warning"]
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        begun_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "bilm_server", *flags, *arguments],
            env={**environment, "XDG_CACHE_HOME": str(caches)},
        )
        try:
            _wait_for_port(path, process)
            open_s = time.perf_counter() - begun_s
            wait_until_serving(f"unix:{path}", process, START_TIMEOUT_S)
            yield open_s, time.perf_counter() - begun_s, process.pid
        finally:
            process.terminate()
            process.wait(_STOP_TIMEOUT_S)


def _wait_for_port(path: str, process: "subprocess.Popen[bytes]") -> None:
    """Look for the port until it accepts a connection.

    Raises:
        ServerStartError: The process has exited.
    """
    while not _accepts(path):
        if process.poll() is not None:
            raise ServerStartError(f"the server exited with code {process.returncode} before its port was open")
        time.sleep(_LOOK_INTERVAL_S)


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as looking:
        return looking.connect_ex(path) == 0


def client_import(report: Findings, effort: Effort) -> None:
    """Measure the processor time of the client's import, in a new process each round."""
    seconds = [_import_s() for _ in range(effort.rounds)]
    report.detail("import", seconds)
    report.add(
        Finding("import/client", "import of the client", Spread.of(seconds), "s", IMPORT_TARGET_S, at_least=False)
    )


def _import_s() -> float:
    done = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _torch_import_s() -> float:
    """Return seconds from the process's start to its end."""
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - begun_s


def _weights(size: str, folder: Path) -> str:
    """Return the model as --model takes it."""
    if size == "default":
        return ""
    path = folder / f"{size}.safetensors"
    bilm = random_bilm(SIZES[size])
    single_file.write(path, bilm.config, bilm.state_dict())
    return str(path)
