"""What an objective is."""

import math
import sys
from typing import Protocol

from bilm_model.bilm import Bilm, BilmState
from bilm_model.kernels.product_paths import ProductPath
from torch import Tensor

from bilm_training.data.streams import WindowPair

States = tuple[BilmState, ...]
"""What is carried from window to window."""

_MAX_EXPONENT = math.log(sys.float_info.max)


class Objective(Protocol):
    """What is minimised: an `nn.Module` with a biLM in it."""

    bilm: Bilm

    def zero_state(self, n_streams: int) -> States:
        """Return what streams begin with."""

    def metric(self, mean_loss: float) -> float:
        """Return the metric that is shown for a mean loss: perplexity, for one."""

    def __call__(self, pair: WindowPair, states: States, bfloat16: ProductPath | None) -> tuple[Tensor, Tensor, States]:
        """Run one window -> the loss of each direction, (2,), summed over tokens; their numbers, (2,); the states."""


def of_nats(mean_loss: float) -> float:
    """Return the perplexity of a mean loss per token; infinite where a model is so wrong that it has no number."""
    return math.exp(mean_loss) if mean_loss < _MAX_EXPONENT else math.inf
