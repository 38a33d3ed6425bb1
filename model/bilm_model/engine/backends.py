"""The choice of a back end, and of what makes results, by the device."""

from collections.abc import Callable

from bilm_model.bilm import Bilm
from bilm_model.engine.backend import Backend, Memory
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.cpu.fastest import fastest_collector
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.results import Collector, TorchCollector

MAX_TICKS = 32
"""Of a round: a sentence that joins waits for one to end, and more would save little, as each tick reads the weights
anyway."""

NewBackend = Callable[[Bilm, Memory, EngineOptions], Backend]
"""Makes the back end of a biLM on the memory's device, with resolved options."""


def new_backend(bilm: Bilm, memory: Memory, options: EngineOptions) -> Backend:
    """Return the back end for the memory's device.

    Raises:
        ConfigError: if a cache is too small to be of use.
    """
    assert options.max_rows is not None  # noqa: S101 - resolved
    if memory.vectors.is_cuda:
        # Not at the top: it loads Triton, which a machine without a GPU needn't have
        from bilm_model.engine.cuda.backend import CudaBackend  # noqa: PLC0415

        cache_bytes = options.input_cache_bytes
        return CudaBackend(bilm, memory, options.max_rows, MAX_TICKS, input_cache_bytes=cache_bytes)
    return CpuBackend(bilm, memory, options.max_rows, options.input_cache_bytes, options.products)


def new_collector(memory: Memory) -> Collector:
    """Return what makes the results of sentences, for the memory's device."""
    return fastest_collector(memory) if memory.vectors.device.type == "cpu" else TorchCollector(memory)
