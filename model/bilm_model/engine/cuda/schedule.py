"""How a tick of a captured graph knows what it is about: a round's indices, always at the same addresses.

A captured graph can't be told anything: it reads from fixed addresses which tick it is, which rows run, and where their
numbers are.

Legend: R rows of the bucket, N steps of the round, T ticks.
"""

import numpy as np
import torch
from torch import Tensor

from bilm_model.engine.planner import Indices, RoundPlan
from bilm_model.engine.transfer import Pages, transfers_of

PLACES, FIRST_INPUTS, LATER_INPUTS, FRESH = 0, 2, 4, 6
"""Columns of `Schedule.steps`: of the forward direction, the backward direction's is the next; `FRESH` is of both."""
N_COLUMNS = 7
_MAX_EXTRA = 6


class Schedule:
    """A round's indices on the device, always at the same addresses.

    Attributes:
        clock: (2,) the tick that it is for the gates, and for the outputs. Each passes the tick on to the other, so
            that no kernel changes what it reads.
        begins: (T + 1,) each tick's first step.
        slots: (R,) of the rows.
        steps: (N, 7) the place of each step's output, and the rows of the input projections that it reads in the first
            and in later layers, for both directions; then whether it starts from h = c = 0.
    """

    def __init__(self, device: torch.device, max_ticks: int, max_rows: int, max_steps: int) -> None:
        """For rounds up to these sizes."""
        self._max_ticks, self._max_rows, self._max_steps = max_ticks, max_rows, max_steps
        self._slots_at = 2 + max_ticks + 1
        self._steps_at = self._slots_at + max_rows
        n_words = self._steps_at + (N_COLUMNS + _MAX_EXTRA) * max_steps
        self._words = torch.zeros(n_words, dtype=torch.int64, device=device)
        self.clock = self._words[:2]
        self.begins = self._words[2 : self._slots_at]
        self.slots = self._words[self._slots_at : self._steps_at]
        self.steps = self._words[self._steps_at :][: N_COLUMNS * max_steps].view(max_steps, N_COLUMNS)
        self._pages = Pages(transfers_of(device), 2, 8 * n_words)

    def send(self, plan: RoundPlan, first_inputs: Indices, extra: Indices) -> Tensor:
        """Start the one transfer of a round.

        Two rounds can be on their way; before it writes a third, this waits until the first has begun: so the device
        always has work, and a sentence that joins isn't kept waiting by a long queue of it.

        Args:
            plan: what to do.
            first_inputs: (2, N) the row of the first layer's input projections for each step.
            extra: up to six numbers a step that are needed, too.

        Returns:
            These, on the device until the next round is sent.

        Raises:
            ValueError: if the round is larger than was said.
        """
        n_steps, n_ticks, n_rows = plan.places.shape[1], len(plan.sizes), len(plan.slots)
        if n_steps > self._max_steps or n_ticks > self._max_ticks or n_rows > self._max_rows:
            raise ValueError(f"a round of {n_rows} rows, {n_ticks} ticks and {n_steps} steps is too large")
        words = self._pages.next(8 * len(self._words)).view(np.int64)
        words[:2] = 0
        words[2 : 3 + n_ticks] = np.cumsum((0, *plan.sizes))
        words[self._slots_at : self._slots_at + n_rows] = plan.slots
        extra_at = self._steps_at + N_COLUMNS * n_steps
        steps = words[self._steps_at : extra_at].reshape(n_steps, N_COLUMNS)
        later_inputs = np.arange(2 * n_steps).reshape(2, n_steps)
        steps[:] = np.concatenate([plan.places, first_inputs, later_inputs, plan.fresh[None]]).T
        end = extra_at + len(extra)
        words[extra_at:end] = extra
        self._pages.send(self._words[:end].view(torch.uint8))
        return self._words[extra_at:end]

    def clear(self) -> None:
        """No row runs at any tick, and all indices are good ones."""
        self._words.zero_()
