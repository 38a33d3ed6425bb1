"""The one place that knows about reduced precision: products in the weight's format, everything else in float32.

The cells' sums and clips stay in float32, so that bfloat16 costs the products' rounding only, not the recurrence's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias, the product in the weight's format, the sum in float32.

    Args:
        x: (…, in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (…, out), float32 where the weight is bfloat16, else in the weight's format.
    """
    if weight.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    y = F.linear(x.to(torch.bfloat16), weight).float()
    return y if bias is None else y + bias


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Valid correlation along the last axis: x (N, in, S), weight (out, in, width) -> (N, out, S - width + 1)."""
    if weight.dtype != torch.bfloat16:
        return F.conv1d(x, weight)
    return F.conv1d(x.to(torch.bfloat16), weight).float()
