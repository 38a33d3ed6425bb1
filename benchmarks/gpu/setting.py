"""What every stage of the check on a GPU is told, and how it measures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.backend import Memory
from bilm_model.engine.backends import MAX_TICKS
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cuda.backend import CudaBackend
from bilm_model.engine.options import EngineOptions
from bilm_model.kernels.product_paths import Precision

from benchmarks.load.sentences import read_sentences

Facts = dict[str, Any]
"""What a stage has found, as JSON; "failed": why it counts as failed."""

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

_WINDOWS = 5


@dataclass(frozen=True)
class Setting:
    """Where a stage computes, and on what.

    Attributes:
        device: a GPU, or the CPU, where everything is tiny and is the CUDA back end on CPU tensors.
    """

    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether sizes are those of a GPU."""
        return self.device.type == "cuda"

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes of models to measure."""
        return ("original", "small") if self.on_gpu else ("tiny",)

    def sentences(self, n: int) -> list[list[str]]:
        """Return the first sentences of WikiText-2's test part: n on a GPU, 20 on a CPU."""
        return read_sentences(n if self.on_gpu else min(n, 20))

    def bilm(self, size: str) -> Bilm:
        """Return random weights of a size, on the CPU."""
        return random_bilm(SIZES[size])

    def batch(self, bilm: Bilm, options: EngineOptions, **parts: Any) -> CellularBatch:
        """Return a warm batch of the CUDA back end.

        Args:
            bilm: taken over.
            options: input projections are computed again unless they say otherwise, as on a GPU.
            parts: of `CudaBackend`.
        """
        assert options.input_cache_mib is not None or self.on_gpu or not parts.get("input_cache_bytes")

        def new_backend(bilm: Bilm, memory: Memory, options: EngineOptions) -> CudaBackend:
            assert options.max_rows is not None
            parts.setdefault("input_cache_bytes", options.input_cache_bytes if self.on_gpu else 0)
            return CudaBackend(bilm, memory, options.max_rows, MAX_TICKS, **parts)

        batch = CellularBatch(bilm, self.device, options, new_backend)
        batch.warm_up()
        return batch

    def synchronize(self) -> None:
        """Wait for everything that the device was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Return the device's seconds for a piece of work: the median of some windows of so many repeats."""
        for _ in range(3):
            work()
        self.synchronize()
        return median(self._window(work, repeats if self.on_gpu else 2) for _ in range(_WINDOWS))

    def _window(self, work: Callable[[], object], repeats: int) -> float:
        if not self.on_gpu:
            begun_s = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - begun_s) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end)) / repeats
