"""What the machine has, for the metrics: memory's limit, and the GPU as NVML sees it."""

import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger("bilm_server.metrics")


def memory_limit_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The lowest limit of the process's control groups (version 1 or 2); without one the machine's memory.

    Args:
        proc: where the kernel shows processes.
        cgroups: where it shows control groups.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_group_limits(proc, cgroups)])


def _group_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits_above(cgroups, path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_above(cgroups / "memory", path, "memory.limit_in_bytes")


def _limits_above(root: Path, path: str, name: str) -> Iterator[int]:
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        try:
            text = (folder / name).read_text().strip()
        except OSError:  # the root has none, and a container doesn't see those above its own
            continue
        if text.isdecimal():  # otherwise "max"
            yield int(text)


@dataclass(frozen=True)
class GpuState:
    """A GPU at a moment.

    Attributes:
        memory_used_bytes: by all processes.
        memory_bytes: that it has.
        busy: share of recent time in which a kernel ran, 0 to 1.
    """

    memory_used_bytes: int
    memory_bytes: int
    busy: float


class Gpu:
    """A GPU, by NVML (the package nvidia-ml-py, which is optional)."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        """Keeps its arguments; `find_gpu` has them."""
        self._nvml, self._handle = nvml, handle
        self._failing = False

    def read(self) -> GpuState | None:
        """Asks the driver; None if it doesn't answer as it should."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            busy = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        except self._nvml.NVMLError as error:
            if not self._failing:
                _log.warning("NVML has no figures of the GPU: %s", error)
            self._failing = True
            return None
        self._failing = False
        return GpuState(memory.used, memory.total, busy)


def find_gpu(uuid: str) -> Gpu | None:
    """The GPU of this UUID, as torch or NVML writes it; None where NVML or its package is missing."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        _log.info("no metrics of the GPU: the package nvidia-ml-py is not installed")
        return None
    try:
        nvml.nvmlInit()
        full = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(full))
    except nvml.NVMLError as error:
        _log.info("no metrics of the GPU: %s", error)
        return None
