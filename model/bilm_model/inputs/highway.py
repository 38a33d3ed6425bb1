"""Highway layers (Srivastava et al. 2015): each component is transformed or carried on, as a gate decides."""

import torch
from torch import Tensor, nn

from bilm_model.affine import Affine, sigmoid


class Highway(nn.Module):
    """y = g·t + (1 − g)·x, with g = σ(gate(x)) and t = relu(transform(x)). Always ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = Affine(dim, dim)
        self.transform = Affine(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, dim) -> (N, dim)."""
        return x + sigmoid(self.gate(x)) * (torch.relu(self.transform(x)) - x)
