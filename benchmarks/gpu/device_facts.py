"""Stages 0 and 1: what the machine has, and how fast its parts are without our code.

Legend: M rows, P projection, C cells.
"""

import os
import platform
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from bilm_model.config import SIZES
from torch import Tensor

from benchmarks.gpu.setting import PRECISIONS, Facts, Setting

_PACKAGES = ("torch", "triton", "numpy", "numba", "grpcio", "protobuf", "safetensors", "pytest")
_COMPILERS = ("cc", "gcc", "clang", "nvcc")
_ROWS, _FEW_ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048), (1, 8)
_COPY_MIB, _FEW_COPY_MIB = (1, 64), (1,)
_STATE_BYTES = 218 * 2**20  # what the gates of 1,024 rows move in a tick, original size
_LAUNCHES = 1000
_WAIT_CYCLES = 400_000  # some 0.2 ms
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def versions(setting: Setting) -> Facts:
    """Return versions, the device, and what Triton needs to compile: a compiler, headers and a writable cache."""
    facts: Facts = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    facts |= {f"has_{name}": shutil.which(name) for name in _COMPILERS}
    facts["has_python_headers"] = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton")
    facts |= {"triton_cache": str(cache), "triton_cache_is_writable": _is_writable(cache)}
    facts |= {"temporary_folder_is_writable": _is_writable(Path(tempfile.gettempdir()))}
    facts |= {"cores": len(os.sched_getaffinity(0)), "cpu": torch.backends.cpu.get_cpu_capability()}
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        facts |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        facts |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def primitives(setting: Setting) -> Facts:
    """Return the times of the exact product shapes, of copies, launches and waking up."""
    facts: Facts = {"products": _products(setting), "copies": _copies(setting)}
    if setting.on_gpu:
        facts |= {"launches": _launches(setting), "waking_up": _waking_up(setting)}
    return facts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _products(setting: Setting) -> Facts:
    """A tick's two products of both directions, in microseconds and TFLOP/s."""
    config = SIZES[setting.sizes[0]]
    shapes = {
        "recurrent": (config.projection_dim, 4 * config.cell_dim),
        "projection": (config.cell_dim, config.projection_dim),
    }
    found: Facts = {}
    for precision in PRECISIONS:
        for name, (n_in, n_out) in shapes.items():
            weight = torch.randn(2, n_in, n_out, device=setting.device).to(_DTYPES[precision])
            for n_rows in _ROWS if setting.on_gpu else _FEW_ROWS:
                x = torch.randn(2, n_rows, n_in, device=setting.device).to(weight.dtype)
                out = x.new_empty(2, n_rows, n_out)
                seconds = setting.seconds(_product(x, weight, out), 50)
                operations = 4 * n_rows * n_in * n_out
                found[f"{name} {precision} {n_rows} rows"] = {
                    "us": 1e6 * seconds,
                    "tflop_per_s": 1e-12 * operations / seconds,
                }
    return found


def _product(x: Tensor, weight: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.bmm(x, weight, out=out)


def _copies(setting: Setting) -> Facts:
    """GB/s on the device (bytes read and written), and to and from pinned memory of the host."""
    state = torch.zeros((_STATE_BYTES if setting.on_gpu else 2**16) // 4, device=setting.device)
    other = torch.empty_like(state)
    found: Facts = {"on the device": 2e-9 * state.nbytes / setting.seconds(lambda: other.copy_(state), 20)}
    for mib in _COPY_MIB if setting.on_gpu else _FEW_COPY_MIB:
        on_device = torch.zeros(mib * 2**18, device=setting.device)
        host = torch.zeros(on_device.shape, pin_memory=setting.on_gpu)
        for name, target, source in (("to the device", on_device, host), ("to the host", host, on_device)):
            seconds = setting.seconds(_copy(target, source), 20)
            found[f"{name}, {mib} MiB"] = 1e-9 * host.nbytes / seconds
    return found


def _copy(target: Tensor, source: Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source, non_blocking=True)


def _launches(setting: Setting) -> Facts:
    """Microseconds of a small kernel: asked for from Python, and within a graph."""
    number, graph = torch.zeros(1, device=setting.device), torch.cuda.CUDAGraph()
    begun_s = time.perf_counter()
    for _ in range(_LAUNCHES):
        number.add_(1)
    asked_s = time.perf_counter() - begun_s
    setting.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            number.add_(1)
    return {
        "asked_for_us": 1e6 * asked_s / _LAUNCHES,
        "in_a_graph_us": 1e6 * setting.seconds(graph.replay, 10) / _LAUNCHES,
    }


def _waking_up(setting: Setting) -> Facts:
    """Microseconds from the end of the device's work to the next line of Python: spinning and sleeping."""
    found: Facts = {}
    for way in ("spinning", "sleeping"):
        waited_us = []
        for _ in range(50):
            begin, end = (torch.cuda.Event(enable_timing=True, blocking=way == "sleeping") for _ in range(2))
            setting.synchronize()
            begun_s = time.perf_counter()
            begin.record()
            torch.cuda._sleep(_WAIT_CYCLES)
            end.record()
            if way == "sleeping":
                end.synchronize()
            else:
                while not end.query():
                    pass
            took_s = time.perf_counter() - begun_s
            waited_us.append(1e6 * took_s - 1e3 * float(begin.elapsed_time(end)))
        found[way] = statistics.median(waited_us)
    return found
