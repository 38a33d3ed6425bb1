"""The start: until the port opens, until the server is SERVING; and the client's import."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import START_TIMEOUT_S, ServerStartError, wait_until_serving
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.weights import single_file

from benchmarks.experiments.in_process import Effort

OPEN_TARGET, SERVING_TARGET = 0.5, 2.2
"""In times of importing torch."""
IMPORT_TARGET_S = 0.3
_LOOK_INTERVAL_S = 0.005
SETTLE_S = 3.0  # a server's last threads of its start have ended
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
            with StartedServer(sources[size], cache) as server:
                opened[size].append(server.open_s)
            return server.serving_s

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


class StartedServer:
    """A server that is started with default settings, as a context manager that gives itself.

    Args:
        model: as bilm-serve's --model.
        caches: folder for compiled kernels.

    Attributes:
        open_s: from the process's start until its port was open.
        serving_s: from the process's start until it was SERVING.
    """

    def __init__(self, model: str, caches: Path) -> None:
        self._model, self._caches = model, caches
        self._folder = tempfile.TemporaryDirectory(prefix="bilm-")
        self._process: subprocess.Popen[bytes] | None = None
        self.open_s = self.serving_s = float("nan")

    def __enter__(self) -> Self:
        path = f"{self._folder.name}/bilm.sock"
        flags = ["--model", self._model, "--listen", self.target, "--drain-delay-s", "0", "--log-level", "warning"]
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        begun_s = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bilm_server", *flags], env={**environment, "XDG_CACHE_HOME": str(self._caches)}
        )
        try:
            _wait_for_port(path, self._process)
            self.open_s = time.perf_counter() - begun_s
            wait_until_serving(self.target, self._process, START_TIMEOUT_S)
            self.serving_s = time.perf_counter() - begun_s
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(_STOP_TIMEOUT_S)
        self._folder.cleanup()

    @property
    def target(self) -> str:
        """Its address."""
        return f"unix:{self._folder.name}/bilm.sock"

    @property
    def process_id(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid


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
