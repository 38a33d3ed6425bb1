"""Compile the Triton kernels for GPUs that needn't be there, into a folder that Triton takes as its cache.

    python -m bilm_model.engine.cuda.compile_kernels FOLDER --capability 80 90 --projection 512

A server with TRITON_CACHE_DIR=FOLDER then compiles no kernel at its start, if its versions of Triton and of these
sources are the same: Triton's keys are made of both. The launcher, which Triton compiles with a C compiler, isn't among
them.

Legend: see `steps`.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bilm_model.engine.cuda import triton_kernels
from bilm_model.engine.cuda.schedule import FIRST_INPUTS, Schedule
from bilm_model.engine.cuda.steps import SAMPLE_CELLS, SAMPLE_COMPONENTS, SAMPLE_ROWS, SAMPLE_SLICES
from bilm_model.engine.cuda.triton_steps import TritonSteps

CAPABILITIES = (80, 86, 89, 90, 100)
_META = torch.device("meta")
"""Tensors without memory: a kernel's key depends on formats, sizes and alignments, and these count as aligned."""
_FORMATS = (torch.float32, torch.bfloat16)
_SLICES = (1, 2, 4, 8, 16)
_CELLS_OF_A_SLICE = 256
"""Any multiple of 16, as those of all models of usual sizes are: Triton tells no other sizes apart."""


class Target:
    """Stand in for Triton's driver of a GPU that isn't there: say for which one to compile."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """Return the device by which a kernel remembers what it has compiled."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


class _Compiled:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return partial(self._kernel.warmup, grid=grid)


def compile_kernels(folder: str, capabilities: Sequence[int], projections: Sequence[int]) -> None:
    """Compile what models with these numbers of components need, and what the check at the start does."""
    names = ("gates_kernel", "cells_kernel", "outputs_kernel")
    kernels = SimpleNamespace(**{name: _Compiled(getattr(triton_kernels, name)) for name in names})
    steps = TritonSteps(kernels=cast(Any, kernels))
    triton.knobs.cache.dir = folder
    triton.knobs.compilation.store_binary_only = True
    for capability in capabilities:
        triton.runtime.driver.set_active(Target(capability))
        for dtype in _FORMATS:
            for n_rows in SAMPLE_ROWS:
                _compile(steps, dtype, (n_rows, SAMPLE_COMPONENTS, SAMPLE_CELLS, SAMPLE_SLICES))
                for n_components, n_slices in itertools.product(projections, _SLICES):
                    _compile(steps, dtype, (n_rows, n_components, n_slices * _CELLS_OF_A_SLICE, n_slices))


def _compile(steps: TritonSteps, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    """Compile for (R, P, C, K)."""
    n_rows, n_components, n_cells, n_slices = sizes

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=_META)

    schedule = Schedule(_META, max_ticks=1, max_rows=n_rows, max_steps=n_rows)
    h_next, weights = empty(2, n_rows, n_components), empty(2, 4 * n_cells, n_components).transpose(1, 2)
    m, gates_x = empty(2 * n_slices, n_rows, n_cells // n_slices), empty(n_rows, 4 * n_cells)
    numbers = partial(empty, dtype=torch.float32)
    c, h, x = numbers(2, n_rows, n_cells), numbers(2, n_rows, n_components), numbers(2, n_rows, n_components)
    steps.cells(schedule, FIRST_INPUTS, h_next, weights, gates_x, c=c, clip=1.0, m=m)
    parts = numbers(2 * n_slices, n_rows, n_components)
    steps.outputs(schedule, parts, clip=1.0, residual="none", h=h, h_next=h_next, x=x, outputs=torch.empty_like(x))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bilm_model.engine.cuda.compile_kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="gets the kernels, beside what is there")
    parser.add_argument(
        "--capability", type=int, nargs="+", default=CAPABILITIES, metavar="N", help="of GPUs: 90 is an H100's, 9.0"
    )
    parser.add_argument(
        "--projection", type=int, nargs="+", default=(128, 256, 512), metavar="P", help="components of models"
    )
    found = parser.parse_args(arguments)
    compile_kernels(found.folder, found.capability, found.projection)
    n_kernels = sum(1 for _ in Path(found.folder).rglob("*.cubin"))
    print(f"{found.folder}: {n_kernels} kernels, for {', '.join(map(str, found.capability))}")


if __name__ == "__main__":
    main()
