"""A trial of a cell at start: whether the kernel for all ticks or products compute it sooner on this machine.

The last-level cache's size doesn't decide by itself: a virtual machine reports the host's, and shares it.

Legend: R rows, N steps, P projection, C cells.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bilm_model.config import BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.cpu.recurrence import LaneWork, PanelRecurrence, RecurrenceTeam, Threads
from bilm_model.kernels.elementwise import Elementwise
from bilm_model.kernels.products import PackedProduct

_ROWS, _TICKS, _TURNS = 128, 2, 3


class CellTrial:
    """A layer's cell, to be computed for a few ticks of full rows in either way."""

    def __init__(
        self, recurrence: PanelRecurrence, lstm: ClippedProjectedLstm, config: BilmConfig, elementwise: Elementwise
    ) -> None:
        """Lay the weights out for products; they are freed with the trial."""
        self._recurrence, self._elementwise, self._clip = recurrence, elementwise, config.cell_clip
        self._input = PackedProduct(lstm.input.weight, lstm.folded_input_bias())
        self._recurrent = PackedProduct(lstm.recurrent.weight)
        projection = lstm.projection
        self._projection = None if projection is None else PackedProduct(projection.weight, clip=config.proj_clip)
        n_steps = _ROWS * _TICKS
        self._work = LaneWork(
            x=torch.full((n_steps, config.projection_dim), 0.1),
            index=None,
            h=torch.zeros(_ROWS, config.projection_dim),
            c=torch.zeros(_ROWS, config.cell_dim),
            slots=torch.arange(_ROWS),
            fresh=torch.zeros(n_steps, dtype=torch.bool),
            ticks=torch.full((_TICKS,), _ROWS),
        )
        n_threads = torch.get_num_threads()
        by_count: dict[int, Threads] = {1: "caller", 2: "helper"}
        self._threads = by_count.get(n_threads, "team")
        self._team = RecurrenceTeam(recurrence, n_threads)

    def run_kernel(self) -> Tensor:
        """Compute the ticks by the kernel, with the threads of a full round; return the outputs (N, P)."""
        return self._team.run([(self._recurrence, self._work)], self._threads)[0]

    def run_products(self) -> Tensor:
        """Compute the ticks by products and elementwise arithmetic; return the outputs (N, P)."""
        work, outputs = self._work, []
        gates_x, h, m = self._input(work.x), work.h, torch.empty_like(work.c)
        for steps in torch.arange(len(work.x)).split(_ROWS):
            gates = (self._recurrent(h), gates_x, steps)
            self._elementwise.lstm(*gates, work.c, work.slots, fresh=work.fresh[steps], clip=self._clip, out=m)
            h = m.clone() if self._projection is None else self._projection(m)
            outputs.append(h)
        return torch.cat(outputs)


def is_faster(
    run: Callable[[], object], other: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> bool:
    """Return whether `run` takes less time than `other`: the best of a few turns of each, after one to warm up."""
    best = [float("inf")] * 2
    for turn in range(1 + _TURNS):
        for i, each in enumerate((run, other)):
            start = clock()
            each()
            if turn:
                best[i] = min(best[i], clock() - start)
    return best[0] < best[1]
