"""An LSTM layer over a whole window, with its gradient: what training spends its time on.

The numbers of `ClippedProjectedLstm` in another order of work. Whatever doesn't wait for the step before is one
product over all steps: the input projections, the inputs' gradient, the gradients of all weights. Only the
recurrent products and the gates go step by step. Autograd would keep, and go back through, a dozen tensors a step.

Legend: S steps, B streams, I input, P projection, C cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bilm_model.contexts.lstm import FORGET_BIAS, ClippedProjectedLstm
from bilm_model.kernels.product_paths import ProductPath, training_path
from torch import Tensor

from bilm_training.network.cells import CellArithmetic, cell_arithmetic


def unrolled(
    lstm: ClippedProjectedLstm, x: Tensor, h: Tensor, c: Tensor, bfloat16: ProductPath | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer over a window of streams that all run to its end.

    Gradients reach x and the layer's parameters, not the state: backpropagation is truncated at the window's beginning.

    Args:
        lstm: the layer.
        x: (S, B, I).
        h: (B, P) recurrent outputs before the window.
        c: (B, C) cells before it.
        bfloat16: how to compute the products with their factors in bfloat16 (mixed precision); None: they are in the
            format of x.

    Returns:
        The outputs (S, B, P), and the h and c after the window, detached.
    """
    projection = None if lstm.projection is None else lstm.projection.weight
    weights = (lstm.input.weight, lstm.input.bias, lstm.recurrent.weight, projection)
    with torch.autocast(x.device.type, enabled=False):  # what is rounded is decided here
        y, h_end, c_end = _Unrolled.apply(x, h, c, *weights, lstm.cell_clip, lstm.proj_clip, bfloat16)
    return y, h_end, c_end


@dataclass(frozen=True)
class _Products:
    """The products of a window.

    Attributes:
        dtype: format of their factors.
        path: how they are computed.
    """

    dtype: torch.dtype
    path: ProductPath

    @classmethod
    def of(cls, x: Tensor, bfloat16: ProductPath | None) -> "_Products":
        if bfloat16 is not None:
            return cls(torch.bfloat16, bfloat16)
        return cls(x.dtype, training_path(x.dtype, x.device.type))

    def by(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product x -> x·weightᵀ; the result has the weight's own format."""
        product = self.path.new_product(weight.to(self.dtype))
        if self.dtype == weight.dtype:
            return product
        return lambda x: product(x.to(self.dtype)).to(weight.dtype)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a·b in the products' format."""
        return self.path.multiply(a, b, self.dtype)


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - torch's convention
        ctx: Any,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        input_weight: Tensor,
        bias: Tensor,
        recurrent_weight: Tensor,
        projection_weight: Tensor | None,
        cell_clip: float,
        proj_clip: float,
        bfloat16: ProductPath | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_steps = len(x)
        products = _Products.of(x, bfloat16)
        arithmetic = cell_arithmetic(x.device.type, x.dtype)
        recur = products.by(recurrent_weight)
        project = None if projection_weight is None else products.by(projection_weight)
        folded = bias.clone()
        folded.chunk(4)[2].add_(FORGET_BIAS)
        gates = _inputs_half(x, input_weight, folded, products)
        cells = x.new_empty(n_steps + 1, *c.shape)
        made = x.new_empty(n_steps, *c.shape)
        outputs = x.new_empty(n_steps + 1, *h.shape)
        cells[0], outputs[0] = c, h
        for t in range(n_steps):
            arithmetic.forward(gates[t], recur(outputs[t]), cells[t], cells[t + 1], made[t], clip=cell_clip)
            if project is None:
                outputs[t + 1] = made[t]
            else:
                torch.clamp(project(made[t]), -proj_clip, proj_clip, out=outputs[t + 1])
        ctx.save_for_backward(x, gates, cells, made, outputs, input_weight, recurrent_weight, projection_weight)
        ctx.clips, ctx.products, ctx.arithmetic = (cell_clip, proj_clip), products, arithmetic
        h_end, c_end = outputs[n_steps].clone(), cells[n_steps].clone()
        ctx.mark_non_differentiable(h_end, c_end)
        return outputs[1:], h_end, c_end

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, cells, made, outputs, input_weight, recurrent_weight, projection_weight = ctx.saved_tensors
        d_gates, d_outputs = _through_time(ctx, dy, gates, cells, outputs, recurrent_weight, projection_weight)
        # The gates have become their gradient; going back a second time would be wrong, and torch says so by this
        torch.autograd.graph.increment_version(gates)
        products: _Products = ctx.products
        flat = d_gates.flatten(0, 1).to(products.dtype)
        dx = products.multiply(flat, input_weight).to(x.dtype).view_as(x)
        d_input = _weight_gradient(flat, x, products)
        d_recurrent = _weight_gradient(flat, outputs[:-1], products)
        d_projection = None
        if projection_weight is not None:
            d_projection = _weight_gradient(d_outputs.flatten(0, 1).to(products.dtype), made, products)
        d_bias = d_gates.sum(dim=(0, 1))
        return dx, None, None, d_input, d_bias, d_recurrent, d_projection, None, None, None


def _through_time(  # noqa: PLR0917
    ctx: Any,
    dy: Tensor,
    gates: Tensor,
    cells: Tensor,
    outputs: Tensor,
    recurrent_weight: Tensor,
    projection_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """From the last step to the first -> gradients by the gates (S, B, 4·C) and by the projected outputs (S, B, P)."""
    cell_clip, proj_clip = ctx.clips
    arithmetic: CellArithmetic = ctx.arithmetic
    recur_back = ctx.products.by(recurrent_weight.t())
    project_back = None if projection_weight is None else ctx.products.by(projection_weight.t())
    # No gradient passes a bound
    passed = None if project_back is None else (outputs[1:].abs() < proj_clip).to(dy.dtype)
    d_outputs = torch.empty_like(dy, memory_format=torch.contiguous_format)
    dc = torch.zeros_like(cells[0])
    dh = torch.zeros_like(outputs[0])
    for t in range(len(dy) - 1, -1, -1):
        torch.add(dy[t], dh, out=d_outputs[t])
        dm = d_outputs[t]
        if project_back is not None and passed is not None:
            dm = project_back(dm.mul_(passed[t]))
        arithmetic.backward(gates[t], cells[t], cells[t + 1], dm, dc, clip=cell_clip)
        dh = recur_back(gates[t])
    return gates, d_outputs


def _inputs_half(x: Tensor, weight: Tensor, bias: Tensor, products: _Products) -> Tensor:
    """(S, B, I) -> (S, B, 4·C), in the format of x."""
    if products.dtype == x.dtype:
        return torch.addmm(bias, x.flatten(0, 1), weight.t()).view(*x.shape[:2], -1)
    projections = products.multiply(x.flatten(0, 1), weight.t()).to(x.dtype)
    return projections.add_(bias).view(*x.shape[:2], -1)


def _weight_gradient(d_out: Tensor, x: Tensor, products: _Products) -> Tensor:
    """Of a product's weight (out, in), from the gradient of what it gave (S·B, out) and its input (S, B, in)."""
    return products.multiply(d_out.t(), x.flatten(0, 1)).to(x.dtype)
