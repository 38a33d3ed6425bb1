"""Characters -> a token's vector, in another order of work than the reference: no loop over filter widths.

All filters are padded to the widest and become one product over windows of characters. Tokens are taken in groups of
about one length, whose windows are a rectangle without an index. Windows that begin behind a token's letters are the
same for all tokens: they are computed once, for the model.

Legend: N tokens, S characters (50), W windows of each token, K characters of a window, E size of a character's
embedding, F filters, P projection.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.alphabet import MAX_CHARACTERS
from bilm_model.characters import END_WORD, PADDING, CharacterIds
from bilm_model.config import BilmConfig
from bilm_model.engine.transfer import Sender
from bilm_model.inputs.highway import Highway
from bilm_model.inputs.token_encoder import TokenEncoder
from bilm_model.kernels.elementwise import Elementwise
from bilm_model.kernels.products import NewProduct, Product, padded_rows

_BYTES_ON_A_GPU = 256 * 2**20
"""Of responses computed together, in float32."""


class Blocks(NamedTuple):
    """How much is computed together, which bounds memory.

    Attributes:
        windows: Of a group at most, unless one token has more.
        in_vain: Windows beyond the shorter tokens' letters in a group at most: as many as another group costs to start.
        tokens: That pass the highways together.
    """

    windows: int
    in_vain: int
    tokens: int


def blocks_of(device: torch.device, n_filters: int) -> Blocks:
    """Return the blocks for a device.

    On a CPU, a group's responses should still be in a cache for the peaks, and 512 tokens make little of reading the
    highways' weights. On a GPU a group costs a dozen starts of kernels from Python, some 0.1 ms (estimated), in which
    it writes and reads the responses of half of a block; few groups count, so memory alone is the bound.
    """
    if device.type == "cpu":
        return Blocks(windows=512, in_vain=64, tokens=512)
    n_windows = max(2 * MAX_CHARACTERS, _BYTES_ON_A_GPU // (4 * n_filters))
    return Blocks(n_windows, n_windows // 2, n_windows // 2)


class WindowEncoder:
    """A `TokenEncoder` for inference."""

    def __init__(
        self,
        encoder: TokenEncoder,
        config: BilmConfig,
        new_product: NewProduct,
        elementwise: Elementwise,
        blocks: Blocks | None = None,
    ) -> None:
        """Take the parameters, each in its format and on its device; blocks None: those for the device."""
        self._activation = config.activation
        self._elementwise = elementwise
        cnn = encoder.char_cnn
        self._embedding = cnn.embedding.detach().to(cnn.kernels[0].dtype)
        self._device = self._embedding.device
        # On a CPU arrays are where they are needed
        self._send = Sender(self._device).send if self._device.type == "cuda" else _as_tensors
        widths = [width for width, count in config.filters for _ in range(count)]
        self._width = max(widths)
        self._blocks = blocks or blocks_of(self._device, len(widths))
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
        found = list(groups(n_characters, self._blocks))
        longest = [int(n_characters[group.start]) for group in found]
        columns = [self._columns(ids[group], self._n_windows(each)) for group, each in zip(found, longest, strict=True)]
        at, *sent = self._send([order, *columns])
        for group, each, characters in zip(found, longest, sent, strict=True):
            self._find_peaks(characters, each, peaks[group])
        vectors = torch.cat([self._after_peaks(block) for block in peaks.split(self._blocks.tokens)])
        return torch.empty_like(vectors).index_copy_(0, at, vectors)

    def _all_fit(self, n_characters: int) -> bool:
        """Return whether what is behind the letters of tokens of so many characters is the same for all of them."""
        return n_characters + self._width <= MAX_CHARACTERS

    def _n_windows(self, n_characters: int) -> int:
        """Return how many windows tokens of at most so many characters need."""
        return n_characters - 1 if self._all_fit(n_characters) else min(n_characters + 1, MAX_CHARACTERS)

    def _find_peaks(self, characters: Tensor, n_characters: int, peaks: Tensor) -> None:
        """Write what the convolutions give for tokens of at most so many characters, marks included, to (N, F)."""
        n_windows, floor = self._n_windows(n_characters), self._floor
        responses = self._responses(self._windows(characters, len(peaks), n_windows))
        if not self._all_fit(n_characters):
            floor = self._no_floor
            each_token = responses[: len(peaks) * n_windows].view(len(peaks), n_windows, -1)
            each_token.masked_fill_(self._too_late[:n_windows], -torch.inf)
        self._elementwise.peaks(responses, n_windows, floor, self._bias, self._activation, out=peaks)

    def _columns(self, ids: CharacterIds, n_windows: int) -> NDArray[np.int32]:
        """Return the characters that the first windows of each token have together, token after token."""
        n_columns = n_windows + self._width - 1
        if n_columns > MAX_CHARACTERS:  # with windows that count for no filter
            ids = np.pad(ids, ((0, 0), (0, n_columns - MAX_CHARACTERS)), constant_values=PADDING)
        return np.ascontiguousarray(ids[:, :n_columns], dtype=np.int32).ravel()

    def _windows(self, columns: Tensor, n_tokens: int, n_windows: int) -> Tensor:
        """Return the first windows of each token, token after token, (padded N·W, K·E); `columns` as `_columns`."""
        n_rows, width, size = n_tokens * n_windows, self._width, self._embedding.shape[1]
        characters = self._embedding.index_select(0, columns)
        overlapping = characters.as_strided(
            (n_tokens, n_windows, width * size), ((n_windows + width - 1) * size, size, 1)
        )
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
        (columns,) = self._send([self._columns(ids, 2)])
        return self._responses(self._windows(columns, 1, 2))[:2].float().amax(0)


def groups(n_characters: NDArray[np.intp], blocks: Blocks) -> Iterator[slice]:
    """Divide tokens of so many characters, the longest first, into groups of about one length.

    Args:
        n_characters: (N,), never growing.
        blocks: how large groups may be; a window for each character of the longest.
    """
    first = 0
    while first < len(n_characters):
        longest = n_characters[first]
        candidates = n_characters[first : first + max(1, blocks.windows // int(longest))]
        in_vain = np.cumsum(longest - candidates)
        end = first + int(np.searchsorted(in_vain, blocks.in_vain, side="right"))
        yield slice(first, end)
        first = end


def _as_tensors(arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _highway_product(highway: Highway, new_product: NewProduct) -> Product:
    """Gate and transform (2·F) together: they read the same input."""
    affines = (highway.gate, highway.transform)
    biases = [affine.bias.detach() for affine in affines if affine.bias is not None]
    return new_product(torch.cat([affine.weight.detach() for affine in affines]), torch.cat(biases))
