"""Products on a CPU with weights laid out for oneDNN beforehand. The one file that uses torch's private operators.

They are faster than torch's own (which lays the weight out anew at each call) and, unlike those, round each row the
same however many rows there are: that is why a sentence's bits don't depend on its company. One row of long vectors is
the exception; it is computed as two.
"""

import logging

import torch
from torch import Tensor, nn

from bilm_model.affine import Affine

_log = logging.getLogger(__name__)

_MIN_ROWS = 2
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


class PackedAffine(nn.Module):
    """An `Affine` for inference."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        weight = affine.weight.detach()
        self._dtype, self._n_out = weight.dtype, weight.shape[0]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = None if affine.bias is None else affine.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """X (N, in) -> (N, out) float32."""
        n_rows = len(x)
        if n_rows == 0:
            return x.new_zeros(0, self._n_out)
        x = x.to(self._dtype).contiguous()
        if (padding := padded_rows(n_rows) - n_rows) > 0:
            x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")[:n_rows].float()
        return y if self._bias is None else y + self._bias


def pack_products(module: nn.Module) -> bool:
    """Replaces every `Affine` below a module, in place; False, and nothing is changed, where this torch can't."""
    if not _works():
        return False
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Affine):
                setattr(parent, name, PackedAffine(child))
    return True


@torch.no_grad()
def _works() -> bool:
    """Tries the operators, which a release of torch may change or leave out, and compares with what they stand for."""
    generator = torch.Generator().manual_seed(0)
    affine = Affine(64, 32)
    for parameter in affine.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(3, 64, generator=generator)
    try:
        found = PackedAffine(affine)(x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        _log.warning("prepacked products are not to be had with torch %s: %s", torch.__version__, error)
        return False
    return torch.allclose(found, affine(x), atol=1e-4)
