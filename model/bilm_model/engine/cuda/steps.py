"""What the CUDA back end does in a tick: the cells with their recurrent product, and the outputs.

The rows are those of a bucket, which may be more than run: the kernels leave the others alone; torch's operators can't,
and compute the first row in their stead, which gives the same numbers at the same place once more.

Legend: R rows of the bucket, N steps of the round, T ticks, K slices of the cells, S slots, A places, P projection,
C cells.
"""

from typing import Protocol, get_args

import torch
from torch import Tensor

from bilm_model.config import Residual
from bilm_model.engine.cuda.schedule import FIRST_INPUTS, FRESH, PLACES, Schedule
from bilm_model.kernels.elementwise import TorchElementwise

SAMPLE_ROWS, SAMPLE_COMPONENTS, SAMPLE_CELLS, SAMPLE_SLICES = (4, 128), 392, 32, 2
"""What `check_steps` tries: rows of each of the tiles that there are for few and for many; and so many components that
products take as many stages and as much shared memory as those that serve."""


class Steps(Protocol):
    """The arithmetic of a tick but for the projection, for both directions."""

    @property
    def name(self) -> str:
        """What it is, for people to read."""

    @property
    def path(self) -> str:
        """The same as a label of the metric `bilm_kernel_path`."""

    def cells(
        self,
        schedule: Schedule,
        column: int,
        h: Tensor,
        weights: Tensor,
        gates_x: Tensor,
        *,
        c: Tensor,
        clip: float,
        m: Tensor,
    ) -> None:
        """One step of the cells of the rows that run, with its recurrent product; a fresh step takes h = c = 0.

        Args:
            schedule: which rows these are.
            column: of `schedule.steps` with the rows of `gates_x`, forward.
            h: (2, R, P) the last step's outputs, one row after another.
            weights: (2, P, 4·C) what makes of h what it adds to the gates input, candidate, forget, output. Each
                column is contiguous.
            gates_x: (any, 4·C) what inputs add, biases and the forget gate's +1 included: of a round, or the cache of
                the first layer's.
            c: (2, S, C) float32 cells, changed in place.
            clip: bound of the cells.
            m: (2·K, R, C/K) gets σ(o)·tanh(c), in slices of the cells: forward's first.
        """

    def outputs(
        self,
        schedule: Schedule,
        parts: Tensor,
        *,
        clip: float,
        residual: Residual,
        h: Tensor,
        h_next: Tensor,
        x: Tensor,
        outputs: Tensor,
    ) -> None:
        """What the step's outputs are, and everywhere that they are needed.

        Args:
            schedule: which rows run, and where their outputs go.
            parts: (2·K, R, P) whose sums over the slices, forward's first, are the outputs.
            clip: their bound.
            residual: "published": the layer's input is added to what it returns and to what the next layer reads;
                "input_to_input": to the latter only; "none": to neither. The recurrence doesn't see it.
            h: (2, S, P) float32 gets the outputs.
            h_next: (2, ≥ R, P) likewise, in its format and for all rows in a row, for the next tick's product.
            x: (2, ≥ N, P) float32 what the layer reads, if that is added; gets what the next layer reads.
            outputs: (2, A, P) float32 gets what the layer returns.
        """


class TorchSteps:
    """One torch operator after another."""

    name = "torch's elementwise operators"
    path = "torch"

    def __init__(self) -> None:
        self._elementwise = TorchElementwise()

    def cells(
        self,
        schedule: Schedule,
        column: int,
        h: Tensor,
        weights: Tensor,
        gates_x: Tensor,
        *,
        c: Tensor,
        clip: float,
        m: Tensor,
    ) -> None:
        """See `Steps`."""
        gates_h = torch.bmm(h, weights)
        n_rows, (_, _, n_cells) = gates_h.shape[1], c.shape
        rows, steps = _rows_and_steps(schedule, schedule.clock[:1], n_rows)
        schedule.clock[1:].copy_(schedule.clock[:1])
        slots, slices = schedule.slots.index_select(0, rows), m.view(2, -1, n_rows, m.shape[2])
        fresh = schedule.steps[:, FRESH].index_select(0, steps).bool()
        for d in range(2):
            out = m.new_empty(n_rows, n_cells)
            index = schedule.steps[:, column + d].index_select(0, steps)
            from_h = gates_h[d].index_select(0, rows)
            self._elementwise.lstm(from_h, gates_x, index, c[d], slots, fresh=fresh, clip=clip, out=out)
            slices[d] = out.view(n_rows, -1, m.shape[2]).transpose(0, 1)

    def outputs(
        self,
        schedule: Schedule,
        parts: Tensor,
        *,
        clip: float,
        residual: Residual,
        h: Tensor,
        h_next: Tensor,
        x: Tensor,
        outputs: Tensor,
    ) -> None:
        """See `Steps`."""
        n_rows = parts.shape[1]
        rows, steps = _rows_and_steps(schedule, schedule.clock[1:], n_rows)
        torch.add(schedule.clock[1:], 1, out=schedule.clock[:1])
        y = parts.float().view(2, -1, n_rows, parts.shape[2]).sum(1).clamp_(-clip, clip).index_select(1, rows)
        h.index_copy_(1, schedule.slots.index_select(0, rows), y)
        h_next[:, :n_rows] = y
        following = y if residual == "none" else y + x.index_select(1, steps)
        x.index_copy_(1, steps, following)
        returned = following if residual == "published" else y
        for d in range(2):
            outputs[d].index_copy_(0, schedule.steps[:, PLACES + d].index_select(0, steps), returned[d])


def _rows_and_steps(schedule: Schedule, tick: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return the rows (R,), the first instead of those that don't run, and the steps that they make."""
    first, end = (schedule.begins.index_select(0, tick + i) for i in (0, 1))
    rows = torch.arange(n_rows, device=tick.device)
    rows = torch.where(rows < end - first, rows, 0)
    return rows, first + rows


def check_steps(steps: Steps, device: torch.device, dtype: torch.dtype) -> None:
    """Try all kernels on a few numbers in a format: those for few rows, and those for many.

    Raises:
        RuntimeError: if they don't compute what `TorchSteps` does.
    """
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for n_bucket in SAMPLE_ROWS:
        found, expected = (_sample(each, device, dtype, n_bucket) for each in (steps, TorchSteps()))
        if not all(torch.allclose(a.float(), b.float(), atol=tolerance) for a, b in zip(found, expected, strict=True)):
            raise RuntimeError("they don't compute what they should")


def _sample(steps: Steps, device: torch.device, dtype: torch.dtype, n_bucket: int) -> list[Tensor]:
    """Return what a step of two rows of a bucket leaves behind."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    schedule = Schedule(device, max_ticks=2, max_rows=n_bucket, max_steps=4)
    schedule.begins.copy_(torch.tensor([0, 2, 4]))
    schedule.slots[:2] = torch.tensor([3, 1])
    schedule.steps.copy_(torch.tensor([[1, 2, 0, 3, 2, 1, 0], [0, 1, 3, 1, 1, 0, 1]]).repeat(2, 1))

    def quarters(*shape: int) -> Tensor:
        return (torch.randint(-1, 2, shape, generator=generator) / 4).to(device, dtype)

    P, C, K = SAMPLE_COMPONENTS, SAMPLE_CELLS, SAMPLE_SLICES
    c, h, x, outputs = numbers(2, 4, C), numbers(2, 4, P), numbers(2, 4, P), numbers(2, 4, P)
    # The product's results have few bits: so it doesn't matter who rounds them to the format, and who adds before
    h_next, weights = quarters(2, n_bucket, P), quarters(2, 4 * C, P)
    m, gates_x = h_next.new_zeros(2 * K, n_bucket, C // K), numbers(4, 4 * C).to(dtype)
    steps.cells(schedule, FIRST_INPUTS, h_next, weights.transpose(1, 2), gates_x, c=c, clip=0.8, m=m)
    parts, left = numbers(2 * K, n_bucket, P), []
    for residual in get_args(Residual):
        steps.outputs(schedule, parts, clip=0.5, residual=residual, h=h, h_next=h_next, x=x, outputs=outputs)
        left += [x.clone(), outputs.clone()]
    # The other rows' belong to no sentence
    return [schedule.clock.float(), m[:, :2], c, h, h_next[:, :2], *left]
