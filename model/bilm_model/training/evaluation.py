"""Perplexity on held-out text."""

import math
from dataclasses import dataclass

import torch

from bilm_model.training.corpus import Text, windows
from bilm_model.training.objective import BilmObjective

_STEPS = 64
_MAX_STREAMS, _MIN_STREAM_TOKENS = 16, 1024


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood per token, end of line included, over the full vocabulary."""

    forward: float
    backward: float

    @property
    def mean(self) -> float:
        """The mean of the two directions."""
        return (self.forward + self.backward) / 2


@torch.no_grad()
def perplexity(objective: BilmObjective, text: Text) -> Perplexity:
    """Reads a text in up to 16 long streams, the state carried from window to window, without dropout."""
    objective.eval()
    streams = max(1, min(_MAX_STREAMS, len(text.tokens) // _MIN_STREAM_TOKENS))
    state = objective.bilm.zero_state(streams)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    forward, backward = windows(text, streams, _STEPS), windows(text.reversed(), streams, _STEPS)
    for pair in zip(forward, backward, strict=True):
        window_sums, window_counts, state = objective(text.types, pair, state)
        sums += window_sums.double().cpu()
        counts += window_counts
    return Perplexity(*(math.exp(value) for value in (sums / counts).tolist()))
