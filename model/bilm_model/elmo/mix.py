"""A trainable mix of layers.

Legend: B sentences, T rows of a sentence, D components of a vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bilm_model.scalar_mix import LAYER_NORM_EPSILON


class TrainableMix(nn.Module):
    """γ · Σₖ softmax(scalar_parameters)ₖ · layerₖ (Peters et al. 2018, equation 1), with AllenNLP's parameter names.

    Args:
        n_layers: layers that are mixed.
        layer_norm: normalise each layer first. As in AllenNLP's `ScalarMix`, one mean and one variance of a layer are
            taken over all components of all unmasked rows of the *batch*, boundaries included: a sentence's vectors
            depend on what is in its batch.
        weights: before the softmax, one for each layer; None: zeros.
        trainable: whether the parameters get gradients.
    """

    def __init__(
        self, n_layers: int, *, layer_norm: bool = False, weights: Sequence[float] | None = None, trainable: bool = True
    ) -> None:
        super().__init__()
        self._layer_norm = layer_norm
        start = [0.0] * n_layers if weights is None else list(weights)
        if len(start) != n_layers:
            raise ValueError(f"scalar_mix_parameters: {len(start)} weights (expected {n_layers}, one for each layer)")
        self.scalar_parameters = nn.ParameterList(
            nn.Parameter(torch.tensor([float(weight)]), requires_grad=trainable) for weight in start
        )
        self.gamma = nn.Parameter(torch.ones(1), requires_grad=trainable)

    def forward(self, layers: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Layers, each (B, T, D), and their mask (B, T) -> (B, T, D)."""
        shares = torch.softmax(torch.cat(list(self.scalar_parameters)), dim=0)
        if self._layer_norm:
            layers = [_normalized(layer, mask) for layer in layers]
        mixed = torch.zeros_like(layers[0])
        for share, layer in zip(shares, layers, strict=True):
            mixed = mixed + share * layer
        return self.gamma * mixed


def _normalized(layer: Tensor, mask: Tensor) -> Tensor:
    """Layer (B, T, D) with mean 0 and variance 1 over the rows of the mask (B, T)."""
    used = mask.unsqueeze(-1)
    n_components = mask.sum() * layer.shape[-1]
    mean = (layer * used).sum() / n_components
    variance = (((layer - mean) * used) ** 2).sum() / n_components
    return (layer - mean) / torch.sqrt(variance + LAYER_NORM_EPSILON)
