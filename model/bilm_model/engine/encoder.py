"""Characters -> a token's vector, in another order of work than the reference: no loop over filter widths.

All filters are padded to the widest and become one product over windows of characters. Of a token's 50 windows only
those that begin in its letters are different; one more stands for all that begin in its padding.

Legend: N tokens, S characters (50), W windows of all tokens, K characters of a window, E size of a character's
embedding, F filters, P projection.
"""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.alphabet import MAX_CHARACTERS
from bilm_model.characters import NO_TOKEN, PADDING, CharacterIds
from bilm_model.config import BilmConfig
from bilm_model.engine.transfer import to_device
from bilm_model.inputs.highway import Highway
from bilm_model.inputs.token_encoder import TokenEncoder
from bilm_model.kernels.elementwise import Elementwise, Windows
from bilm_model.kernels.products import NewProduct, Product, padded_rows

_BLOCK_WINDOWS = 2048
"""Windows computed together: bounds the memory that they take."""


class WindowEncoder:
    """A `TokenEncoder` for inference."""

    def __init__(
        self, encoder: TokenEncoder, config: BilmConfig, new_product: NewProduct, elementwise: Elementwise
    ) -> None:
        """Take the parameters, each in its format and on its device."""
        self._activation = config.activation
        self._elementwise = elementwise
        cnn = encoder.char_cnn
        self._embedding = cnn.embedding.detach().to(cnn.kernels[0].dtype)
        self._device = self._embedding.device
        widths = [width for width, count in config.filters for _ in range(count)]
        self._width = max(widths)
        padded = [
            torch.nn.functional.pad(kernel.detach(), (0, self._width - kernel.shape[2])) for kernel in cnn.kernels
        ]
        # (F, E, K) -> (F, K·E): a window's characters stand one after another
        self._responses = new_product(torch.cat(padded).transpose(1, 2).flatten(1))
        self._bias = torch.cat([bias.detach() for bias in cnn.biases])
        self._last_start = torch.tensor([MAX_CHARACTERS - w for w in widths], dtype=torch.int32, device=self._device)
        self._highways = [_highway_product(cast(Highway, highway), new_product) for highway in encoder.highways]
        projection = encoder.projection
        self._projection = None if projection is None else new_product(projection.weight, projection.bias)

    def __call__(self, ids: CharacterIds) -> Tensor:
        """Ids (N, S) -> (N, P) float32."""
        block = np.cumsum(_count_windows(ids)) // _BLOCK_WINDOWS
        return torch.cat([self._encode(part) for part in np.split(ids, np.flatnonzero(np.diff(block)) + 1)])

    def _encode(self, ids: CharacterIds) -> Tensor:
        n_tokens = len(ids)
        # Tokens that stand for nothing fill up the rows that are computed anyway
        ids = np.pad(ids, ((0, padded_rows(n_tokens) - n_tokens), (0, 0)), constant_values=PADDING)
        characters, windows = self._windows(ids)
        responses = self._responses(self._embedding[characters].flatten(1))
        x = self._elementwise.peaks(responses, windows, self._bias, self._activation)
        dtype = responses.dtype
        for highway in self._highways:
            x = self._elementwise.highway(x, highway(x.to(dtype)))
        return (x if self._projection is None else self._projection(x.to(dtype)).float())[:n_tokens]

    def _windows(self, ids: CharacterIds) -> tuple[Tensor, Windows]:
        """Return the characters (padded W, K) of all windows, and whose they are."""
        n_windows = _count_windows(ids)
        first = np.concatenate([[0], np.cumsum(n_windows)])
        token = np.repeat(np.arange(len(ids)), n_windows)
        start = np.arange(first[-1]) - first[token]
        # Beyond a token's end there is nothing; what doesn't fit before it is left out of the peaks
        extended = np.pad(ids, ((0, 0), (0, self._width - 1)), constant_values=NO_TOKEN)
        views = np.lib.stride_tricks.sliding_window_view(extended, self._width, axis=1)
        characters = np.zeros((padded_rows(int(first[-1])), self._width), dtype=np.int64)
        characters[: first[-1]] = views[token, start]
        windows = Windows(self._to_device(first), self._to_device(start.astype(np.int32)), self._last_start)
        return self._to_device(characters), windows

    def _to_device(self, array: NDArray[np.int32 | np.int64]) -> Tensor:
        return to_device(array, self._device)


def _highway_product(highway: Highway, new_product: NewProduct) -> Product:
    """Gate and transform (2·F) together: they read the same input."""
    affines = (highway.gate, highway.transform)
    biases = [affine.bias.detach() for affine in affines if affine.bias is not None]
    return new_product(torch.cat([affine.weight.detach() for affine in affines]), torch.cat(biases))


def _count_windows(ids: CharacterIds) -> NDArray[np.int64]:
    """(N,) different windows of each token."""
    n_letters: NDArray[np.int64] = (ids != PADDING).sum(axis=1)
    return np.minimum(n_letters + 1, MAX_CHARACTERS)
