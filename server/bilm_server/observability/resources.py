"""The GPU as NVML sees it, for the metrics."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


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
        """Keep the library and the GPU's handle, which `find_gpu` finds."""
        self._nvml, self._handle = nvml, handle
        self._failing = False

    def read(self) -> GpuState | None:
        """Return the driver's metrics; None if it fails."""
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


def find_gpu(uuid: str, load: Callable[[str], Any] = importlib.import_module) -> Gpu | None:
    """Return the GPU of a UUID; None where NVML or its package is missing.

    Args:
        uuid: as torch or NVML writes it.
        load: imports a package by its name.
    """
    try:
        nvml: Any = load("pynvml")
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
