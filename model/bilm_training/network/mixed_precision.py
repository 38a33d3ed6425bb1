"""Mixed precision: the factors of products in bfloat16, everything else in float32.

By autocast where bfloat16 products are native. Elsewhere torch would emulate them, slowly, so the products that
autocast would round are computed in float32 from rounded factors, and rounded at their end: the same values, and the
same gradients, up to the order of sums.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from bilm_model.affine import rounded
from bilm_model.kernels.product_paths import ProductPath
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def bfloat16_products(device_type: str, path: ProductPath) -> Iterator[None]:
    """Round the factors of the modules' products (`F.linear`, `F.conv1d`) to bfloat16, in whatever way `path` says.

    `torch.autocast(device_type, enabled=False)` exempts what stands in it, on either path.
    """
    with torch.autocast(device_type, torch.bfloat16):
        if path.rounded:
            with _RoundedFactors(device_type):
                yield
        else:
            yield


class _RoundedFactors(TorchFunctionMode):
    """Stands between autocast and the products that it knows."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (F.linear, F.conv1d) or not torch.is_autocast_enabled(self._device_type):
            return func(*args, **kwargs)
        with torch.autocast(self._device_type, enabled=False):
            args = tuple(rounded(each) if isinstance(each, Tensor) else each for each in args)
            kwargs = {key: rounded(each) if isinstance(each, Tensor) else each for key, each in kwargs.items()}
            return func(*args, **kwargs).to(torch.bfloat16)
