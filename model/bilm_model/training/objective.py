"""What is learnt: the next word, forward and backward.

Legend: S steps, B streams, P projection, V words.
"""

import numpy as np
import torch
from torch import Tensor, nn

from bilm_model.bilm import Bilm, BilmState
from bilm_model.characters import CharacterIds, check_ids
from bilm_model.packing import Packing
from bilm_model.training.corpus import Window


class BilmObjective(nn.Module):
    """A biLM with the softmax that it is trained under (Peters et al. 2018, section 3.1).

    Both directions share the character encoder and one adaptive softmax (Grave et al. 2017), which gives exact
    probabilities over the whole vocabulary at a fraction of a full softmax's cost.
    """

    def __init__(self, bilm: Bilm, n_classes: int, cutoffs: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.bilm = bilm
        bounds = [cutoff for cutoff in cutoffs if cutoff < n_classes - 1]
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(bilm.config.projection_dim, n_classes, bounds or [n_classes - 1])
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, types: CharacterIds, pair: tuple[Window, Window], state: BilmState
    ) -> tuple[Tensor, Tensor, BilmState]:
        """Runs one window of each direction.

        Args:
            types: character ids of the text's types.
            pair: the windows of the text and of the text reversed.
            state: after the windows before.

        Returns:
            The negative log likelihood of each direction, (2,), summed over counted targets; their numbers, (2,); and
            the state, cut off from the graph.
        """
        vectors, places = self._token_vectors(types, pair)
        sums, ends = [], []
        for d, (direction, window, index) in enumerate(zip(self.bilm.directions, pair, places, strict=True)):
            packing = _full_packing(*window.tokens.shape)
            outputs, h, c = direction(self.dropout(vectors[index]), packing, state.h[:, d], state.c[:, d])
            sums.append(self._loss(outputs[-1], window))
            ends.append((h.detach(), c.detach()))
        h, c = (torch.stack(parts, dim=1) for parts in zip(*ends, strict=True))
        counts = torch.tensor([int(window.counted.sum()) for window in pair])
        return torch.stack(sums), counts, BilmState(h, c)

    def _token_vectors(self, types: CharacterIds, pair: tuple[Window, Window]) -> tuple[Tensor, list[Tensor]]:
        """Each different token is encoded once: its vector (types here, P), and where each row of a window finds it."""
        present, inverse = np.unique(np.concatenate([w.tokens.ravel() for w in pair]), return_inverse=True)
        check_ids(types[present])
        device = self.bilm.encoder.char_cnn.embedding.device
        vectors = self.bilm.encoder(torch.from_numpy(types[present]).long().to(device))
        sizes = [window.tokens.size for window in pair]
        return vectors, list(torch.split(torch.from_numpy(inverse.ravel()).to(device), sizes))

    def _loss(self, output: Tensor, window: Window) -> Tensor:
        counted = torch.from_numpy(window.counted.ravel()).to(output.device)
        targets = torch.from_numpy(window.targets.ravel()).to(output.device)[counted]
        log_likelihood: Tensor = self.softmax(self.dropout(output[counted]), targets).output
        return -log_likelihood.sum()


def _full_packing(n_steps: int, n_streams: int) -> Packing:
    """Streams of equal length: the packed layout is simply step after step."""
    rows = torch.arange(n_steps * n_streams)
    return Packing(torch.arange(n_streams), (n_streams,) * n_steps, rows, rows)
