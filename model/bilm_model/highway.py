"""Highway layers (Srivastava et al. 2015): each component is transformed or carried on, as a gate decides."""

import torch
from torch import Tensor, nn

from bilm_model.precision import affine


class Highway(nn.Module):
    """y = g·t + (1 − g)·x, with g = σ(gate(x)) and t = relu(transform(x)). Always ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate_weight = nn.Parameter(torch.empty(dim, dim))
        self.gate_bias = nn.Parameter(torch.empty(dim))
        self.transform_weight = nn.Parameter(torch.empty(dim, dim))
        self.transform_bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """X (N, dim) -> (N, dim)."""
        gate = torch.sigmoid(affine(x, self.gate_weight, self.gate_bias))
        transformed = torch.relu(affine(x, self.transform_weight, self.transform_bias))
        return torch.lerp(x, transformed, gate)
