"""Characters -> a token's vector, in another order of work than the reference: no loop over filter widths.

All filters are padded to the widest and become one product over windows of characters. Tokens are taken in groups of
about one length, whose windows are a rectangle without an index. Windows that begin behind a token's letters are the
same for all tokens: they are computed once, for the model.

Legend: N tokens, S characters (50), W windows of each token, K characters of a window, E size of a character's
embedding, F filters, P projection.
"""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.alphabet import MAX_CHARACTERS
from bilm_model.characters import END_WORD, PADDING, CharacterIds
from bilm_model.config import BilmConfig
from bilm_model.engine.transfer import to_device
from bilm_model.inputs.highway import Highway
from bilm_model.inputs.token_encoder import TokenEncoder
from bilm_model.kernels.elementwise import Elementwise
from bilm_model.kernels.products import NewProduct, Product, padded_rows

_GROUP_WINDOWS = {"cpu": 512, "cuda": 4096}
"""Windows computed together, by the kind of device: on a CPU their responses should still be in a cache for the peaks,
on a GPU few starts of kernels count. They bound memory, too."""
_IN_VAIN = 64
"""Windows beyond the shorter tokens' letters in a group at most: another group would cost about as much to start."""
_BLOCK_TOKENS = 512
"""Tokens that pass the highways together: bounds memory, and is enough to make little of reading the weights."""


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
        padded = [F.pad(kernel.detach(), (0, self._width - kernel.shape[2])) for kernel in cnn.kernels]
        # (F, E, K) -> (F, K·E): a window's characters stand one after another
        self._responses = new_product(torch.cat(padded).transpose(1, 2).flatten(1))
        self._bias = torch.cat([bias.detach() for bias in cnn.biases])
        last_start = torch.tensor([MAX_CHARACTERS - width for width in widths])
        self._too_late = (torch.arange(MAX_CHARACTERS)[:, None] > last_start).to(self._device)  # (S, F)
        self._highways = [_highway_product(cast(Highway, highway), new_product) for highway in encoder.highways]
        projection = encoder.projection
        self._projection = None if projection is None else new_product(projection.weight, projection.bias)
        self._no_floor = torch.full((len(widths),), -torch.inf, device=self._device)
        self._floor = self._behind_letters()

    def __call__(self, ids: CharacterIds) -> Tensor:
        """Ids (N, S) -> (N, P) float32."""
        n_characters = np.count_nonzero(ids != PADDING, axis=1)
        order = np.argsort(-n_characters, kind="stable")
        ids, n_characters = ids[order], n_characters[order]
        peaks = torch.empty(len(ids), len(self._bias), device=self._device)
        for group in groups(n_characters, _GROUP_WINDOWS[self._device.type]):
            self._find_peaks(ids[group], int(n_characters[group.start]), peaks[group])
        vectors = torch.cat([self._after_peaks(block) for block in peaks.split(_BLOCK_TOKENS)])
        return torch.empty_like(vectors).index_copy_(0, to_device(order, self._device), vectors)

    def _find_peaks(self, ids: CharacterIds, n_characters: int, peaks: Tensor) -> None:
        """Write what the convolutions give for tokens of at most so many characters, marks included, to (N, F)."""
        all_fit = n_characters + self._width <= MAX_CHARACTERS
        if all_fit:
            n_windows, floor = n_characters - 1, self._floor
        else:  # what is behind the letters depends on where that is
            n_windows, floor = min(n_characters + 1, MAX_CHARACTERS), self._no_floor
        n_rows = len(ids) * n_windows
        responses = self._responses(self._windows(ids, n_windows))
        if not all_fit:
            each_token = responses[:n_rows].view(len(ids), n_windows, -1)
            each_token.masked_fill_(self._too_late[:n_windows], -torch.inf)
        self._elementwise.peaks(responses, n_windows, floor, self._bias, self._activation, out=peaks)

    def _windows(self, ids: CharacterIds, n_windows: int) -> Tensor:
        """Return the first windows of each token, token after token, (padded N·W, K·E)."""
        n_rows, width, size = len(ids) * n_windows, self._width, self._embedding.shape[1]
        n_columns = n_windows + width - 1
        if n_columns > MAX_CHARACTERS:  # with windows that count for no filter
            ids = np.pad(ids, ((0, 0), (0, n_columns - MAX_CHARACTERS)), constant_values=PADDING)
        columns = np.ascontiguousarray(ids[:, :n_columns], dtype=np.int32).ravel()
        characters = self._embedding.index_select(0, to_device(columns, self._device))
        overlapping = characters.as_strided((len(ids), n_windows, width * size), (n_columns * size, size, 1))
        windows = characters.new_empty(padded_rows(n_rows), width * size)
        windows[:n_rows].view(overlapping.shape).copy_(overlapping)
        windows[n_rows:] = 0.0
        return windows

    def _after_peaks(self, x: Tensor) -> Tensor:
        """X (N, F) -> the tokens' vectors (N, P) float32."""
        n_tokens, dtype = len(x), self._embedding.dtype
        # Rows that stand for nothing fill up those that are computed anyway
        x = F.pad(x, (0, 0, 0, padded_rows(n_tokens) - n_tokens))
        for highway in self._highways:
            x = self._elementwise.highway(x, highway(x.to(dtype)))
        return (x if self._projection is None else self._projection(x.to(dtype)).float())[:n_tokens]

    def _behind_letters(self) -> Tensor:
        """Return the largest responses (F,) of the windows that begin with a token's end mark and behind it."""
        ids = np.full((1, 1 + self._width), PADDING, dtype=np.int16)
        ids[0, 0] = END_WORD
        return self._responses(self._windows(ids, 2))[:2].float().amax(0)


def groups(n_characters: NDArray[np.intp], n_windows: int) -> Iterator[slice]:
    """Divide tokens of so many characters, the longest first, into groups of about one length.

    Args:
        n_characters: (N,), never growing.
        n_windows: that a group has at most, unless one token has more; a window for each character of the longest.
    """
    first = 0
    while first < len(n_characters):
        longest = n_characters[first]
        candidates = n_characters[first : first + max(1, n_windows // int(longest))]
        in_vain = np.cumsum(longest - candidates)
        end = first + int(np.searchsorted(in_vain, _IN_VAIN, side="right"))
        yield slice(first, end)
        first = end


def _highway_product(highway: Highway, new_product: NewProduct) -> Product:
    """Gate and transform (2·F) together: they read the same input."""
    affines = (highway.gate, highway.transform)
    biases = [affine.bias.detach() for affine in affines if affine.bias is not None]
    return new_product(torch.cat([affine.weight.detach() for affine in affines]), torch.cat(biases))
