"""The Triton kernels on a CPU, by Triton's interpreter."""

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

import bilm_model.engine.cuda.steps
import numpy as np
import pytest
from bilm_model.engine.cuda.steps import Steps


def interpreted_steps(fused: str = "off") -> Steps:
    """Return the steps with interpreted kernels; only in float32 fused, as the interpreter's bfloat16 dot is wrong."""
    pytest.importorskip("triton.language", reason="Triton is not installed")
    from bilm_model.engine.cuda.triton_steps import TritonSteps

    return TritonSteps(cast(Any, fused), kernels=_interpreted_kernels(), hardware_tanh=False)


@functools.cache
def _interpreted_kernels() -> ModuleType:
    """Load the kernels once more: whether they are interpreted is decided where they are defined.

    Triton's own functions stay compiled, for others to use; so the kernels do without those that are kernels, too.
    """
    path = Path(bilm_model.engine.cuda.steps.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_triton_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _round_once_in_fma()
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    return module


def _round_once_in_fma() -> None:
    """Make the interpreter's fma what a GPU's is: before Triton 3.9 it rounds the product, too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma
