"""The LSTM layers of one direction.

Legend: N packed rows (all steps of all sentences), B sentences, L layers, C cells, P projection.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bilm_model.config import BilmConfig, Residual
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.contexts.packing import Packing


class Direction(nn.Module):
    """The LSTM layers of one direction; the two directions meet only in the result."""

    def __init__(self, config: BilmConfig) -> None:
        super().__init__()
        self._residual = config.residual
        self.layers = nn.ModuleList(ClippedProjectedLstm(config) for _ in range(config.n_layers))

    def forward(self, x: Tensor, packing: Packing, h: Tensor, c: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """X (N, P) packed, h (L, B, P), c (L, B, C) -> each layer's output (N, P) packed, the next h and c."""
        return run_layers(self.layers, x, packing, h, c, residual=self._residual)


def run_layers(
    layers: Iterable[Callable[..., tuple[Tensor, Tensor, Tensor]]],
    x: Tensor,
    packing: Packing,
    h: Tensor,
    c: Tensor,
    *,
    residual: Residual,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Run the layers of a direction, each a `ClippedProjectedLstm` or called like one; see `Direction.forward`."""
    outputs: list[Tensor] = []
    ends = []
    for layer, layer_h, layer_c in zip(layers, h, c, strict=True):
        y, *end = layer(x, packing, layer_h, layer_c)
        ends.append(end)
        # Which residual: see `BilmConfig.residual`; the recurrence doesn't see a sum.
        output = x + y if residual == "published" and outputs else y
        x = x + y if residual == "input_to_input" else output
        outputs.append(output)
    return outputs, torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])
