"""Convolutions over the characters of each token.

Legend: N tokens, S characters of a token (50), F filters of all widths, E size of a character's embedding.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilm_model.affine import convolve
from bilm_model.alphabet import CHARACTER_COUNT
from bilm_model.config import Activation, BilmConfig


class CharCnn(nn.Module):
    """Character ids -> one number a filter: its largest response anywhere in the token, then the activation.

    Source: `_ElmoCharacterEncoder` of AllenNLP. In-word padding is embedded and convolved like any character.
    """

    def __init__(self, config: BilmConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(CHARACTER_COUNT, config.char_dim))
        shapes = [(count, config.char_dim, width) for width, count in config.filters]
        self.kernels = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(count)) for _, count in config.filters)
        self._activation = config.activation

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (N, S) -> (N, F)."""
        filters = zip(self.kernels, self.biases, strict=True)
        return largest_responses(ids, self.embedding, filters, self._activation)


def largest_responses(
    ids: Tensor, embedding: Tensor, filters: Iterable[tuple[Tensor, Tensor]], activation: Activation
) -> Tensor:
    """Convolve the characters of tokens and keep each filter's largest response.

    Args:
        ids: (N, S) character ids.
        embedding: (characters, E).
        filters: kernel (filters, E, width) and bias (filters,) for each width.
        activation: after the maximum.

    Returns:
        (N, F), widths in their order.
    """
    # Not embedding[ids], whose gradient threads sum up in whatever order they come
    characters = F.embedding(ids, embedding).transpose(1, 2)  # (N, E, S)
    peaks = [convolve(characters, kernel).max(dim=-1).values + bias for kernel, bias in filters]
    return (torch.relu if activation == "relu" else torch.tanh)(torch.cat(peaks, dim=-1))
