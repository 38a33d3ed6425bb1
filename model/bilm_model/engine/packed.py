"""Products on a CPU with weights laid out for oneDNN beforehand. The one file that uses torch's private operators.

They are faster than torch's own (which lays the weight out anew at each call) and, unlike those, round each row the
same however many rows there are: that is why a sentence's bits don't depend on its company. One row of long vectors is
the exception; so none is computed alone.
"""

import functools
import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

# Two would do for the bits; four read a large weight faster, by a sixth at 512 -> 16384 (AMD EPYC with AVX-512)
_MIN_ROWS = 4
_MAX_EXACT_ROWS = 64


def padded_rows(n_rows: int) -> int:
    """How many rows to compute for so many.

    oneDNN compiles a kernel for each number of rows that it meets and keeps a thousand of them, at several hundred
    kilobytes each. So beyond 64 rows numbers are rounded up, by an eighth at most: kernels stay few, and are soon warm.
    """
    if n_rows <= _MAX_EXACT_ROWS:
        return max(n_rows, _MIN_ROWS)
    step = 1 << (n_rows.bit_length() - 4)
    return -(-n_rows // step) * step


class Product(Protocol):
    """x (N, in) -> x·weightᵀ (+ bias), clipped to ±clip if that is given; (N, out) in the weight's format."""

    def __call__(self, x: Tensor) -> Tensor:
        """X has the weight's format."""


class NewProduct(Protocol):
    """Makes a `Product` of a weight (out, in), a bias (out) and a clip."""

    def __call__(self, weight: Tensor, bias: Tensor | None = None, clip: float | None = None) -> Product:
        """The weight's format is the product's."""


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


def cpu_product() -> NewProduct:
    """The fastest kind of product that works here."""
    return PackedProduct if _works() else PlainProduct


@functools.cache
@torch.no_grad()
def _works() -> bool:
    """Tries the operators, which a release of torch may change or leave out, and compares with what they stand for."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((32, 64), (32,), (3, 64)))
    try:
        found = PackedProduct(weight, bias, clip=3.0)(x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        _log.warning("prepacked products are not to be had with torch %s: %s", torch.__version__, error)
        return False
    return torch.allclose(found, PlainProduct(weight, bias, clip=3.0)(x), atol=1e-4)
