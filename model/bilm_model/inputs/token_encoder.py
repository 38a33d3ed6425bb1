"""Characters -> token vectors.

Legend: N tokens, F filters of all widths, P projection.
"""

from typing import cast

from torch import Tensor, nn

from bilm_model.affine import Affine
from bilm_model.config import BilmConfig
from bilm_model.inputs.char_cnn import CharCnn
from bilm_model.inputs.highway import Highway


class TokenEncoder(nn.Module):
    """Characters -> a token's vector before the LSTMs, the same wherever the token stands."""

    def __init__(self, config: BilmConfig) -> None:
        super().__init__()
        self.projection = Affine(config.n_filters, config.projection_dim) if config.has_cnn_projection else None
        self.char_cnn = CharCnn(config)
        self.highways = nn.ModuleList(Highway(config.n_filters) for _ in range(config.n_highway))

    def forward(self, ids: Tensor) -> Tensor:
        """Character ids (N, 50) -> (N, P)."""
        return self.after_cnn(self.char_cnn(ids))

    def after_cnn(self, x: Tensor) -> Tensor:
        """Return the token vectors (N, P) for what the convolutions gave, (N, F)."""
        for highway in self.highways:
            x = highway(x)
        return x if self.projection is None else cast(Tensor, self.projection(x))
