"""One step of learning: a window forward, its gradient, the optimiser."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from bilm_model.kernels.product_paths import ProductPath, training_path
from torch import Tensor, nn

from bilm_training.data.streams import WindowPair
from bilm_training.errors import DivergedError
from bilm_training.network.mixed_precision import bfloat16_products
from bilm_training.objectives.objective import Objective, States
from bilm_training.recipe import Optimisation


@dataclass(frozen=True, eq=False)
class TrainStepResult:
    """What a step gave.

    Attributes:
        sums: (2,) float64 on the CPU, the loss of each direction, summed over tokens.
        counts: (2,) their numbers.
        states: to continue from.
        gradient_norm: Euclidean, before it was clipped.
        learning_rate: of this step.
    """

    sums: Tensor
    counts: Tensor
    states: States
    gradient_norm: float
    learning_rate: float


class Learner:
    """An objective with its optimiser.

    Attributes:
        module: the objective.
        products: how bfloat16 products are computed; None: they are in float32.
    """

    def __init__(
        self,
        objective: Objective,
        optimisation: Optimisation,
        total_steps: int,
        device: torch.device,
        bfloat16: ProductPath | None = None,
    ) -> None:
        """Take an objective on its device.

        Args:
            objective: what to minimise.
            optimisation: how; its precision is resolved.
            total_steps: of the run, for the schedule.
            device: where the objective is.
            bfloat16: how to compute bfloat16 products, if the precision is bfloat16; None: the fastest way here.
        """
        self.module = cast(nn.Module, objective)
        self._objective, self._device = objective, device
        self._clip = optimisation.gradient_clip
        self.products: ProductPath | None = None
        if optimisation.precision == "bfloat16":
            self.products = bfloat16 or training_path(torch.bfloat16, device.type)
        self._optimiser = _optimiser(self.module, optimisation, device.type)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, _schedule(optimisation, total_steps))

    def learn(self, pair: WindowPair, states: States) -> TrainStepResult:
        """Make a step.

        Raises:
            DivergedError: if the loss or the gradient is no number; nothing was changed by this step.
        """
        rate = self._optimiser.param_groups[0]["lr"]
        with self._precision():
            sums, counts, states = self._objective(pair, states, self.products)
        losses = sums.detach().double().cpu()
        if not torch.isfinite(losses).all():
            raise DivergedError(f"the loss is {losses.tolist()} in the window at step {pair.position} of the streams")
        self._optimiser.zero_grad(set_to_none=True)
        (sums.sum() / max(1, int(counts.sum()))).backward()  # a short window may have nothing to predict
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self._clip))
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient's norm is {norm} in the window at step {pair.position} of the streams")
        self._optimiser.step()
        self._schedule.step()
        # The row of 'no token here' must stay what the published format takes it for
        self._objective.bilm.encoder.char_cnn.embedding.data[0] = 0.0
        return TrainStepResult(losses, counts, states, norm, rate)

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.products is None else bfloat16_products(self._device.type, self.products)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on beside the objective's parameters and random numbers."""
        return {"optimiser": self._optimiser.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        fused = self._optimiser.param_groups[0]["fused"]
        self._optimiser.load_state_dict(content["optimiser"])
        for group in self._optimiser.param_groups:
            group["fused"] = fused  # of this device: a run may be resumed on another one
        self._schedule.load_state_dict(content["schedule"])


def can_fuse(optimiser: str, device_type: str) -> bool:
    """Return whether torch has an optimiser as one kernel on a device: Adagrad it has for CPUs only."""
    return optimiser != "adagrad" or device_type == "cpu"


def _optimiser(module: nn.Module, optimisation: Optimisation, device_type: str) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
    }
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = True if can_fuse(optimisation.optimiser, device_type) else None
    optimiser: torch.optim.Optimizer = kinds[optimisation.optimiser](
        parameters, lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay, fused=fused
    )
    return optimiser


def _schedule(optimisation: Optimisation, total_steps: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        if step < optimisation.warmup_steps:
            return (step + 1) / optimisation.warmup_steps
        done = (step - optimisation.warmup_steps) / max(1, total_steps - optimisation.warmup_steps)
        if optimisation.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if optimisation.schedule == "linear" else 1.0

    return rate
