"""Products on a CPU with weights laid out for oneDNN beforehand. The one file that uses torch's private operators.

They are faster than torch's own (which lays the weight out anew at each call) and, unlike those, round each row the
same however many rows there are: that is why a sentence's bits don't depend on its company. One row of long vectors is
an exception; so none is computed alone. bfloat16 products by Intel's AMX are another; so these come in blocks of rows.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Two would do for the bits; four read a large weight faster, by a sixth at 512 -> 16384 (AMD EPYC with AVX-512)
_MIN_ROWS = 4
_MIN_STEP = 2
BLOCK_ROWS = 64


def padded_rows(n_rows: int) -> int:
    """Return how many rows to compute for so many.

    oneDNN compiles a kernel for each number of rows that it meets and keeps a thousand of them, at several hundred
    kilobytes each. So numbers are rounded up, to an even number and beyond 16 rows by an eighth at most: kernels stay
    few, and are soon warm.
    """
    step = max(_MIN_STEP, 1 << max(0, n_rows.bit_length() - 4))
    return max(_MIN_ROWS, -(-n_rows // step) * step)


class Product(Protocol):
    """x (N, in) -> x·weightᵀ (+ bias), clipped to ±clip if that is given; (N, out) in the weight's format."""

    def __call__(self, x: Tensor) -> Tensor:
        """X has the weight's format."""


class NewProduct(Protocol):
    """Makes a `Product` of a weight (out, in), a bias (out) and a clip."""

    def __call__(self, weight: Tensor, bias: Tensor | None = None, clip: float | None = None) -> Product:
        """Return a product in the weight's format."""


class PackedProduct:
    """A product with its weight laid out for oneDNN. X has `padded_rows` rows, for bits that don't depend on them."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, clip: float | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = None if bias is None else bias.detach().to(weight.dtype)
        self._post, self._scalars = ("none", []) if clip is None else ("hardtanh", [-clip, clip])
        self._operator = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """See `Product`."""
        y: Tensor = self._operator(x, self._weight, self._bias, self._post, self._scalars, "")
        return y


class PlainProduct:
    """A product by torch's own operators, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, clip: float | None = None) -> None:
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach().to(weight.dtype)
        self._clip = clip

    def __call__(self, x: Tensor) -> Tensor:
        """See `Product`."""
        y = F.linear(x, self._weight, self._bias)
        return y if self._clip is None else y.clamp_(-self._clip, self._clip)


class BlockedProduct:
    """A product computed in blocks of 64 rows, the last one filled up with zeros.

    For kernels that round a row differently with the number of rows: here it is always the same. Intel's AMX has such;
    there 512 -> 16384 takes 1.2 ms for a block of 64 rows, 0.8 ms for 4 rows by themselves, on one core.
    """

    def __init__(
        self, new_product: NewProduct, weight: Tensor, bias: Tensor | None = None, clip: float | None = None
    ) -> None:
        self._product = new_product(weight, bias, clip)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Product`; any number of rows."""
        filled = F.pad(x, (0, 0, 0, -len(x) % BLOCK_ROWS))
        blocks = [self._product(block) for block in filled.split(BLOCK_ROWS)]
        return (torch.cat(blocks) if len(blocks) > 1 else blocks[0])[: len(x)]


class RoundedProduct:
    """A float32 product of bfloat16 factors, for processors without bfloat16 products.

    The factors are exact in float32, and the result is rounded to bfloat16 where a bfloat16 product rounds it: after
    the bias and the clip. So the values are those of a bfloat16 product up to the order of its sums. The weight is kept
    in float32 and takes twice the memory.
    """

    def __init__(
        self, new_product: NewProduct, weight: Tensor, bias: Tensor | None = None, clip: float | None = None
    ) -> None:
        """Lay out a weight (out, in) and a bias (out) of any format, which are rounded first, by `new_product`."""
        rounded = None if bias is None else bias.detach().to(torch.bfloat16).float()
        self._product = new_product(weight.detach().to(torch.bfloat16).float(), rounded, clip)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Product`; x (N, in) and the result (N, out) are in bfloat16."""
        return self._product(x.to(torch.bfloat16).float()).to(torch.bfloat16)
