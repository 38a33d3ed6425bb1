"""What is made of the layers: a selection or a mix, pooled, normalised. Each sentence by itself.

Legend: L layers, T tokens (T + 2 with the boundaries), D components of a vector.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["none", "mean", "max"]

LAYER_NORM_EPSILON = 1e-13
"""As in AllenNLP 2."""


@dataclass(frozen=True)
class LayerMix:
    """The ELMo mix, γ · Σₖ softmax(weights)ₖ · layerₖ (Peters et al. 2018, equation 1).

    Attributes:
        weights: one for each layer, before the softmax.
        gamma: factor of the result.
        layer_norm: normalise each layer first, by one scalar mean and variance of this sentence's layer, boundaries
            included, as `ScalarMix(do_layer_norm=True)` of AllenNLP does for a batch of one.
    """

    weights: tuple[float, ...]
    gamma: float = 1.0
    layer_norm: bool = False

    def __call__(self, layers: Tensor) -> Tensor:
        """Layers (L, T, D) -> (T, D)."""
        if self.layer_norm and layers.numel():
            variance, mean = torch.var_mean(layers, dim=(1, 2), keepdim=True, correction=0)
            layers = (layers - mean) / torch.sqrt(variance + LAYER_NORM_EPSILON)
        shares = torch.softmax(torch.tensor(self.weights, device=layers.device, dtype=layers.dtype), dim=0)
        return self.gamma * torch.einsum("l,ltd->td", shares, layers)

    def shares(self) -> list[float]:
        """Return γ · softmax(weights), a number for each layer, computed on the host."""
        highest = max(self.weights)
        powers = [math.exp(weight - highest) for weight in self.weights]
        return [self.gamma * power / sum(powers) for power in powers]


@dataclass(frozen=True)
class Selection:
    """What to return of a sentence's layers.

    Attributes:
        layers: all of them, the last, their mean, or a mix.
        pooling: over the tokens.
        l2_normalize: scale each vector to length 1; zero stays zero.
    """

    layers: Literal["all", "top", "average"] | LayerMix = "all"
    pooling: Pooling = "none"
    l2_normalize: bool = False

    def __call__(self, layers: Tensor) -> Tensor:
        """Return the wanted vectors.

        Args:
            layers: (L, T + 2, D) with the boundaries, or (L, 0, D) for a sentence without tokens.

        Returns:
            [L if "all"] [T unless pooled] D.
        """
        vectors = self._pool(self._combine(layers))
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors

    def _combine(self, layers: Tensor) -> Tensor:
        """(L, T + 2, D) -> ([L,] T, D)."""
        if isinstance(self.layers, LayerMix):
            return self.layers(layers)[1:-1]
        layers = layers[:, 1:-1]
        if self.layers == "top":
            return layers[-1]
        return layers.mean(dim=0) if self.layers == "average" else layers

    def _pool(self, vectors: Tensor) -> Tensor:
        """([L,] T, D) -> ([L,] [T,] D)."""
        if self.pooling == "mean":
            return vectors.mean(dim=-2)
        return vectors.amax(dim=-2) if self.pooling == "max" else vectors
