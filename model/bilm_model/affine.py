"""What the network is made of: products, and the one function that torch doesn't have as we need it.

The one place that knows about reduced precision: products are in the weight's format, everything else in float32, so
that bfloat16 costs the products' rounding only, not the recurrence's. A bfloat16 product is computed here in float32,
from rounded factors, and rounded at its end: no processor has to know bfloat16, and the values are those of a bfloat16
product up to the order of its sums. What serves and trains uses faster ones where there are any (`kernels.products`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Affine(nn.Module):
    """x·weightᵀ (+ bias), the product in the weight's format, the sum in float32."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """X (N, in) -> (N, out), float32 where the weight is bfloat16, else in the weight's format."""
        if self.weight.dtype != torch.bfloat16:
            return F.linear(x, self.weight, self.bias)
        y = rounded(F.linear(rounded(x), rounded(self.weight)))
        return y if self.bias is None else y + self.bias


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Valid correlation along the last axis: x (N, in, S), weight (out, in, width) -> (N, out, S - width + 1)."""
    if weight.dtype != torch.bfloat16:
        return F.conv1d(x, weight)
    return rounded(F.conv1d(rounded(x), rounded(weight)))


def rounded(x: Tensor) -> Tensor:
    """Return x rounded to bfloat16, in float32; the gradient is rounded likewise."""
    return x.to(torch.bfloat16).float()


def sigmoid(x: Tensor) -> Tensor:
    """Return the logistic function.

    `torch.sigmoid` rounds the last few elements of an array differently from the rest, so that a row's bits would
    depend on how many rows there are; `torch.tanh` doesn't.
    """
    return 0.5 + 0.5 * torch.tanh(0.5 * x)
