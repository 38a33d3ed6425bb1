"""Launch the Triton kernels as a run on a GPU does, where none is: `python -m tests.support.kernel_runs FOLDER 90`.

They are looked up in the folder, or compiled into it; loading and launching them does nothing.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton
from bilm_model.engine.cuda.compile_kernels import Target
from bilm_model.engine.cuda.steps import check_steps
from bilm_model.engine.cuda.triton_steps import TritonSteps
from bilm_model.engine.options import EngineOptions

from tests.parity.test_cuda import BACKENDS, CPU, FORMATS, WIDE, engine_of


class Device(Target):
    """A driver that loads and launches nothing.

    Attributes:
        n_launched: how often a kernel was to be launched.
    """

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.n_launched = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *of_kernel: ("a module", "a function", 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def launch(*of_kernel: object) -> None:
            self.n_launched += 1

        return launch


def main(folder: str, capability: str) -> None:
    """Launch the check's kernels, and ticks of few and of many rows; print how many kernels that were."""
    device = Device(int(capability))
    os.environ["TRITON_CACHE_DIR"] = folder
    triton.runtime.driver.set_active(device)
    for dtype in FORMATS:
        with contextlib.suppress(RuntimeError):  # nothing is computed, which is what the check finds
            check_steps(TritonSteps(), CPU, dtype)
        options = EngineOptions("bfloat16" if dtype == torch.bfloat16 else "float32", max_rows=100)
        engine = engine_of(WIDE, options=options, steps=TritonSteps())
        for layer, bucket in ((0, 1), (1, 1), (0, 100)):
            BACKENDS[engine].tick(layer, bucket)
    print(device.n_launched)


if __name__ == "__main__":
    main(*sys.argv[1:])
