"""What is learnt: the next word, forward and backward.

Legend: S steps, B streams, N = S·B rows, P projection, V words, U different tokens of a window.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from bilm_model.alphabet import MAX_CHARACTERS
from bilm_model.bilm import Bilm, BilmState
from bilm_model.characters import END_WORD, CharacterIds, check_ids
from bilm_model.kernels.product_paths import ProductPath
from bilm_model.kernels.products import padded_rows
from numpy.typing import NDArray
from torch import Tensor, nn

from bilm_training.data.streams import TextWindow, WindowPair
from bilm_training.errors import TargetError
from bilm_training.network.unrolled import unrolled
from bilm_training.objectives.objective import of_nats
from bilm_training.recipe import Softmax

# Tokens are convolved in groups by length: most are far shorter than the 50 places that a token has
_GROUP_BOUNDS = (6, 10, 16)


class BilmObjective(nn.Module):
    """A biLM with the softmax that it is trained under (Peters et al. 2018, section 3.1).

    Both directions share the character encoder and the softmax.
    """

    def __init__(self, bilm: Bilm, n_classes: int, softmax: Softmax, dropout: float) -> None:
        super().__init__()
        self.bilm = bilm
        self.n_classes = n_classes
        self.softmax = _new_softmax(softmax, bilm.config.projection_dim, n_classes)
        self.dropout = nn.Dropout(dropout)

    def zero_state(self, n_streams: int) -> tuple[BilmState]:
        """Return the state before any text."""
        return (self.bilm.zero_state(n_streams),)

    def metric(self, mean_loss: float) -> float:
        """Perplexity, of nats a token."""
        return of_nats(mean_loss)

    def forward(
        self, pair: WindowPair, states: tuple[BilmState, ...], bfloat16: ProductPath | None = None
    ) -> tuple[Tensor, Tensor, tuple[BilmState]]:
        """Run one window of each direction.

        Args:
            pair: the windows.
            states: after the windows before: one.
            bfloat16: how to compute the LSTMs' products in bfloat16; None: in the parameters' format.

        Returns:
            The negative log likelihood of each direction, (2,), in nats, summed over counted targets; their numbers,
            (2,); and the state, cut off from the graph.

        Raises:
            TargetError: naming the place of a target that has no class.
        """
        check_targets(pair, self.n_classes)
        layers, state = self.layers(pair, states[0], bfloat16)
        sums = [self._loss(outputs[-1], window) for outputs, window in zip(layers, pair.directions, strict=True)]
        counts = torch.tensor([int(window.counted.sum()) for window in pair.directions])
        return torch.stack(sums), counts, (state,)

    def layers(
        self, pair: WindowPair, state: BilmState, bfloat16: ProductPath | None
    ) -> tuple[list[list[Tensor]], BilmState]:
        """See `window_layers`."""
        return window_layers(self.bilm, pair, state, self.dropout, bfloat16)

    def _loss(self, output: Tensor, window: TextWindow) -> Tensor:
        # All rows, and the others' loss left out afterwards: as many in each window, see `_Cluster`
        targets = torch.from_numpy(window.targets.ravel()).to(output.device)
        counted = torch.from_numpy(window.counted.ravel()).to(output.device)
        x = self.dropout(output.flatten(0, 1))
        if isinstance(self.softmax, nn.AdaptiveLogSoftmaxWithLoss):
            losses = -self.softmax(x, targets).output
        else:
            losses = F.cross_entropy(self.softmax(x), targets, reduction="none")
        total: Tensor = losses.masked_fill(~counted, 0.0).sum()
        return total


class _Cluster(nn.Sequential):
    """A cluster of the adaptive softmax. On a CPU it isn't computed in reduced precision.

    It has another number of rows in each window, and oneDNN compiles a kernel for each number, which takes longer than
    the product. In float32 torch's products aren't oneDNN's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """X (rows, P) -> (rows, words of the cluster)."""
        if x.device.type != "cpu":
            return cast(Tensor, super().forward(x))
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, super().forward(x))


def _new_softmax(softmax: Softmax, n_in: int, n_classes: int) -> nn.Module:
    """Adaptive (Grave et al. 2017): exact over the whole vocabulary, at a fraction of a full softmax's cost."""
    if softmax.kind == "full":
        module: nn.Module = nn.Linear(n_in, n_classes)
    else:
        cutoffs = [cutoff for cutoff in softmax.cutoffs if cutoff < n_classes - 1]
        module = nn.AdaptiveLogSoftmaxWithLoss(n_in, n_classes, cutoffs or [n_classes - 1], softmax.divisor)
        module.tail = nn.ModuleList(_Cluster(*cast(nn.Sequential, tail)) for tail in module.tail)
    for product in module.modules():
        if isinstance(product, nn.Linear):
            # In mixed precision only products are in the reduced format, not the logarithms after them
            product.register_forward_hook(lambda _, x, y: y.to(x[0].dtype))
    return module


def check_targets(pair: WindowPair, n_classes: int) -> None:
    """Make sure that the softmax has every target.

    On a GPU a bad one is an assertion of the device, which names no place and ends the process's use of it.

    Raises:
        TargetError: naming direction, stream and step.
    """
    for name, window in zip(("forward", "backward"), pair.directions, strict=True):
        bad = np.argwhere((window.targets < 0) | (window.targets >= n_classes))
        if len(bad):
            step, stream = map(int, bad[0])
            found = int(window.targets[step, stream])
            raise TargetError(
                f"{name} target of stream {stream}, step {pair.position + step}: expected a class from 0 to "
                f"{n_classes - 1}, found {found}"
            )


def window_layers(
    bilm: Bilm, pair: WindowPair, state: BilmState, dropout: nn.Module, bfloat16: ProductPath | None = None
) -> tuple[list[list[Tensor]], BilmState]:
    """Return what a biLM makes of a window.

    Dropout stands where bilm-tf has it: before each LSTM layer, the residual included.

    Returns:
        For each direction the token layer and the LSTM layers' outputs, (S, B, P) each; the state, cut off.
    """
    vectors, places = _token_vectors(bilm, pair)
    layers, ends = [], []
    for d, index in enumerate(places):
        x = F.embedding(index, vectors)  # (S, B, P); its gradient is summed up in a fixed order
        outputs, *end = _direction(bilm, d, x, state, dropout=dropout, bfloat16=bfloat16)
        layers.append([x, *outputs])
        ends.append(end)
    h, c = (torch.stack(parts, dim=1) for parts in zip(*ends, strict=True))
    return layers, BilmState(h, c)


def _direction(
    bilm: Bilm, d: int, x: Tensor, state: BilmState, *, dropout: nn.Module, bfloat16: ProductPath | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """See `Direction` in the reference network."""
    residual = bilm.config.residual
    outputs: list[Tensor] = []
    ends = []
    for k, lstm in enumerate(bilm.lstms(d)):
        x = dropout(x)
        y, *end = unrolled(lstm, x, state.h[k, d], state.c[k, d], bfloat16)
        ends.append(end)
        if residual == "published" and k:
            y = y + x
        outputs.append(y)
        x = x + y if residual == "input_to_input" else y
    return outputs, torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])


def _token_vectors(bilm: Bilm, pair: WindowPair) -> tuple[Tensor, list[Tensor]]:
    """Encode each different token once; return the vectors (U, P), and which of them stands at each place (S, B)."""
    check_ids(pair.types)
    device = bilm.encoder.char_cnn.embedding.device
    widest = max(width for width, _ in bilm.config.filters)
    groups, places = _groups_by_length(pair.types, widest)
    # One after another for the convolutions only: what follows doesn't know about characters
    peaks = [bilm.encoder.char_cnn(torch.from_numpy(ids).long().to(device)) for ids in groups]
    # In mixed precision only products are in the reduced format
    vectors = bilm.encoder.after_cnn(torch.cat(peaks)).to(bilm.encoder.char_cnn.embedding.dtype)
    return vectors, [torch.from_numpy(places[window.tokens]).to(device) for window in pair.directions]


def _groups_by_length(types: CharacterIds, widest: int) -> tuple[Sequence[CharacterIds], NDArray[np.int64]]:
    """Character ids by length, cut off where only padding follows, and the row of each type in the groups together.

    Behind a token's end every convolution sees padding and nothing else, over and over: once is enough for the maximum.
    Rows and lengths are rounded up, rows by repeating one, so that few shapes occur: see `padded_rows`.
    """
    ends = np.argmax(types == END_WORD, axis=1)  # place of the mark; 48 bytes at most stand before it
    groups, n_rows = [], 0
    places = np.empty(len(types), np.int64)
    lower = -1
    for bound in (*_GROUP_BOUNDS, MAX_CHARACTERS):
        chosen = np.flatnonzero((ends > lower) & (ends <= bound))
        lower = bound
        if len(chosen):
            last_end = min(bound, -(-int(ends[chosen].max()) // 8) * 8)
            places[chosen] = n_rows + np.arange(len(chosen))
            padded = np.concatenate([chosen, np.repeat(chosen[:1], padded_rows(len(chosen)) - len(chosen))])
            groups.append(types[padded, : min(MAX_CHARACTERS, last_end + 1 + widest)])
            n_rows += len(padded)
    return groups, places
