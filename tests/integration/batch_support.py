"""What the tests of `bilm-embed` share; it has no tests of its own."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from bilm_client.batch.main import main
from numpy.typing import NDArray

from tests.support.hooked_engine import HookedEngine, Hooks
from tests.support.processes import started

Datasets = dict[str, NDArray[Any]]
SENTENCES = "sentence_to_index"
STOPPED, REFUSED = 1, 2


class Valve:
    """Let engines do so many rounds with sentences in flight, and hold their threads otherwise."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False

    def hold(self, engine: HookedEngine[Any]) -> None:
        engine.hooks = Hooks(advance=self._wait)

    def _wait(self) -> None:
        assert self._open or self._permits.acquire(timeout=240)

    def let_through(self, rounds: int) -> None:
        self._permits.release(rounds)

    def open(self) -> None:
        self._open = True
        self._permits.release(1000)


def embed(target: str, text: Path, output: Path, *flags: str) -> int:
    return main([str(text), str(output), "--target", target, *flags])


def embed_command(target: str, text: Path, output: Path, *flags: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-m", "bilm_client.batch", str(text), str(output), "--target", target]
    return [*command, *flags]


@contextmanager
def embedding(
    target: str, text: Path, output: Path, *flags: str, stdin: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`bilm-embed` in a process of its own."""
    pipes = {"stdin": stdin, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with started(embed_command(target, text, output, *flags), **pipes, text=True) as process:
        yield process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = process.communicate(timeout=240)
    return process.returncode, errors


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def wait_for_size(path: Path, size_bytes: int, process: subprocess.Popen[str]) -> None:
    """Waits until a file has grown to so many bytes."""
    deadline_s = time.monotonic() + 240
    while not path.exists() or path.stat().st_size < size_bytes:
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < deadline_s, "it never grew"
        time.sleep(0.002)


def write(path: Path, *lines: str | Sequence[str]) -> Path:
    texts = [line if isinstance(line, str) else " ".join(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def datasets(path: Path) -> Datasets:
    """The vectors of a file, by key; those of HDF5 only if they lie at its root."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return {key: archive[key] for key in archive if key not in (SENTENCES, "bilm_serve")}
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file if key != SENTENCES}


def run_of(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return dict(json.loads(file.attrs["bilm_serve"]))


def assert_same(found: Datasets, expected: Datasets, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, vectors in expected.items():
        assert found[key].dtype == vectors.dtype
        np.testing.assert_allclose(found[key], vectors, rtol=0, atol=tolerance, err_msg=key)
