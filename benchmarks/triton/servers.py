"""Starts and stops the Triton contestants, and finds the better of their settings."""

import os
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Any

from benchmarks.load.load import LoadGenerator
from benchmarks.load.pipe import PipeError
from benchmarks.paths import ROOT

_READY_S = 120.0
_STOP_S = 30.0
_LOOK_INTERVAL_S = 0.5
_PORTS = 3


@dataclass(frozen=True)
class TritonSetting:
    """How Triton is run.

    Attributes:
        order: of work, "published" or "engine".
        instances: of the model, each in a thread.
        threads: that each instance computes with.
        max_batch: sentences that the dynamic batcher puts together.
    """

    order: str
    instances: int
    threads: int
    max_batch: int

    def __str__(self) -> str:
        return f"{self.instances} × {self.threads} threads, batches up to {self.max_batch}"


class TritonServer:
    """One Triton with its load generator, as a context manager that gives the latter.

    Args:
        setting: how to run it.
        size: of the model.
        sentences: of the generator.
        python: that has pytriton.
    """

    def __init__(self, setting: TritonSetting, size: str, sentences: int, python: str) -> None:
        self._setting, self._size, self._sentences, self._python = setting, size, sentences, python
        self._output: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LoadGenerator:
        port = _free_ports()
        self._output = self._stack.enter_context(tempfile.TemporaryFile())
        self._process = subprocess.Popen(
            self._command(port), cwd=ROOT, env=self._environment(), stdout=self._output, stderr=self._output
        )
        self._stack.callback(self._stop)
        target = f"127.0.0.1:{port + 1}"
        try:
            generator = LoadGenerator(target, self._sentences, protocol="triton", python=self._python)
            return self._wait_until_ready(self._stack.enter_context(generator))
        except BaseException:
            self._stack.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _command(self, port: int) -> list[str]:
        setting = self._setting
        flags = {"order": setting.order, "instances": setting.instances, "max-batch": setting.max_batch}
        flags |= {"size": self._size, "port": port}
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return [self._python, "-m", "benchmarks.triton.peer", *arguments]

    def _environment(self) -> dict[str, str]:
        # Without the library's path, Triton's Python stub loads another libpython than the one that runs us
        libraries = os.pathsep.join(filter(None, [_library_folder(self._python), os.environ.get("LD_LIBRARY_PATH")]))
        # Our package can't be installed there: its gRPC family and Triton's client want different protobufs
        ours = os.pathsep.join(
            [*map(str, (ROOT / "model", ROOT / "system")), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        threads = str(self._setting.threads)
        return {**os.environ, "LD_LIBRARY_PATH": libraries, "PYTHONPATH": ours, "OMP_NUM_THREADS": threads}

    def _wait_until_ready(self, generator: LoadGenerator) -> LoadGenerator:
        """Until the model answers: the server says that it is ready before the model is."""
        assert self._process is not None
        end_s = time.monotonic() + _READY_S
        while time.monotonic() < end_s and self._process.poll() is None:
            try:
                generator.ask("show", index=0)
                return generator
            except PipeError:
                time.sleep(_LOOK_INTERVAL_S)
        assert self._output is not None
        self._output.seek(0)
        raise PipeError(f"Triton is not ready:\n{self._output.read().decode(errors='replace')[-3000:]}")

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def best_setting(
    settings: Sequence[TritonSetting], start: Callable[[TritonSetting], TritonServer], callers: int, seconds: float
) -> tuple[TritonSetting, dict[str, float]]:
    """Return the setting with which most sentences a second come through, and what all of them gave."""
    found: dict[TritonSetting, float] = {}
    for setting in settings:
        with start(setting) as generator:
            answer: dict[str, Any] = generator.closed(callers, 1, seconds / 2, seconds)
            found[setting] = answer["sentences"] / answer["seconds"]
            print(f"  Triton, {setting.order}, {setting}: {found[setting]:,.1f} sentences/s", flush=True)
    return max(found, key=found.__getitem__), {str(setting): rate for setting, rate in found.items()}


def settings_to_try(order: str, cores: int) -> list[TritonSetting]:
    """Batch sizes and thread layouts for an order of work."""
    if order == "engine":
        return [TritonSetting(order, 1, cores, batch) for batch in (32, 128)]
    one_instance = [TritonSetting(order, 1, cores, batch) for batch in (4, 16, 64)]
    return one_instance + [replace(setting, instances=cores, threads=1) for setting in one_instance if cores > 1]


def _library_folder(python: str) -> str:
    question = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    answer = subprocess.run([python, "-c", question], capture_output=True, text=True, check=True)
    return answer.stdout.strip() or str(sysconfig.get_config_var("LIBDIR"))


def _free_ports() -> int:
    """Return the first of several free ports in a row."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                for offset in range(1, _PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except (OSError, OverflowError):
                continue
            return port
