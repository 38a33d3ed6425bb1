"""The Triton kernels on a CPU, by Triton's interpreter."""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, cast
from unittest import mock

import bilm_model.engine.cuda.steps
import numpy as np
import pytest
from bilm_model.engine.cuda.steps import Steps


@functools.cache
def interpreted_steps() -> Steps:
    """Their interpreted twin. Which it is to be is decided where a kernel is defined: so the module is loaded again.

    Triton's own functions stay compiled, for others to use; so the kernels do without those that are kernels, too.
    """
    pytest.importorskip("triton.language", reason="Triton is not installed")
    path = Path(bilm_model.engine.cuda.steps.__file__).with_name("triton_steps.py")
    spec = importlib.util.spec_from_file_location("interpreted_triton_steps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _round_once_in_fma()
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    return cast(Steps, module.TritonSteps(hardware_tanh=False))


def _round_once_in_fma() -> None:
    """Make the interpreter's fma what a GPU's is: before Triton 3.9 it rounds the product, too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma
