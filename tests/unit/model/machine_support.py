"""Machines that tests stand in for, and features that they need of the present one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bilm_model.kernels.product_paths import has_bfloat16_products
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("addmm", "bmm", "baddbmm", "conv", "linear", "mm", "mv", "matmul", "reorder_linear_weight")


class _NoProducts(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    dtype: torch.dtype
    message: str

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == self.dtype for leaf in leaves):
            name = func.__name__
            if any(product in name for product in _PRODUCTS):
                raise RuntimeError(f"{name}: {self.message}")
        return func(*args, **(kwargs or {}))


class NoBfloat16Products(_NoProducts):  # type: ignore[no-untyped-call] # likewise
    """A processor without bfloat16: any product of bfloat16 factors ends the test."""

    dtype, message = torch.bfloat16, "bfloat16 path needs the cpu support avx512bw, avx512vl and avx512dq"


class NoFloat32Products(_NoProducts):  # type: ignore[no-untyped-call] # likewise
    """Any product of float32 factors outside of our own kernels ends the test."""

    dtype, message = torch.float32, "expected no product outside of the kernel for all ticks"


def needs_bfloat16() -> None:
    """Skips a test of torch's own bfloat16 products where it would raise."""
    if not has_bfloat16_products():
        pytest.skip("needs a processor with bfloat16 products (AVX-512 or AVX-NE-CONVERT)")
