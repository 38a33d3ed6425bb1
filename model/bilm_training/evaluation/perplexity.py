"""Perplexity on held-out text."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from bilm_training.data.streams import Streams
from bilm_training.objectives.objective import Objective, of_nats


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood per token, end of line included, over the full vocabulary.

    Attributes:
        forward: of the next word.
        backward: of the word before.
        tokens: that were predicted, in each direction.
    """

    forward: float
    backward: float
    tokens: int

    @property
    def mean(self) -> float:
        """The mean of the two directions."""
        return (self.forward + self.backward) / 2


def perplexity(objective: Objective, streams: Streams) -> Perplexity:
    """Measure; see `mean_losses`."""
    forward, backward, tokens = mean_losses(objective, streams)
    return Perplexity(of_nats(forward), of_nats(backward), tokens)


@torch.no_grad()
def mean_losses(objective: Objective, streams: Streams) -> tuple[float, float, int]:
    """Return the mean loss per token of each direction, in nats, and the number of tokens.

    The state is carried from window to window; there is no dropout, and nothing in reduced precision.
    """
    cast(nn.Module, objective).eval()
    states = objective.zero_state(streams.n_streams)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for pair in streams.windows():
        window_sums, window_counts, states = objective(pair, states, None)
        sums += window_sums.double().cpu()
        counts += window_counts
    forward, backward = (sums / counts).tolist()
    return forward, backward, int(counts[0])
