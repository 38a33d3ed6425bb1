"""The projected, clipped LSTM of the published biLMs.

Legend: N packed rows (all steps of all sentences), R rows of a step, B sentences, C cells, P projection, I input.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bilm_model.affine import Affine, sigmoid
from bilm_model.config import BilmConfig
from bilm_model.contexts.packing import Packing

FORGET_BIAS = 1.0
"""Added to the forget gate at run time; the files don't hold it."""


class ClippedProjectedLstm(nn.Module):
    """One layer of one direction.

    Source: `LstmCellWithProjection` of AllenNLP. `nn.LSTM(proj_size=…)` has neither of the clips, and in the published
    models both bind. Gates are stored in the order input, candidate, forget, output.
    """

    def __init__(self, config: BilmConfig) -> None:
        super().__init__()
        self.cell_clip, self.proj_clip = config.cell_clip, config.proj_clip
        self.input = Affine(config.projection_dim, 4 * config.cell_dim)
        self.recurrent = Affine(config.projection_dim, 4 * config.cell_dim, bias=False)
        self.projection: Affine | None = None
        if config.has_lstm_projection:
            self.projection = Affine(config.cell_dim, config.projection_dim, bias=False)

    def folded_input_bias(self) -> Tensor:
        """Return the input projection's bias (4·C), the forget gate's constant included."""
        assert self.input.bias is not None  # noqa: S101 - the constructor gave it one
        bias = self.input.bias.detach().clone()
        bias.chunk(4)[2].add_(FORGET_BIAS)
        return bias

    def forward(self, x: Tensor, packing: Packing, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer over all steps.

        Args:
            x: (N, I), packed.
            packing: of these sentences.
            h: (B, P) recurrent output before the first step, in the packing's order.
            c: (B, C) cells before the first step, likewise.

        Returns:
            The outputs (N, P), packed; h and c after each sentence's last step.
        """
        # The input projections are known for all steps at once: one product reads the weights once.
        return run_steps(self.step, self.input(x), packing, h, c)

    def step(self, gates_x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step: the input projection (R, 4·C), h (R, P), c (R, C) -> the next h and c."""
        i, j, f, o = (gates_x + self.recurrent(h)).chunk(4, dim=-1)
        h, c = advance_cells((i, j, f + FORGET_BIAS, o), c, self.cell_clip)
        if self.projection is not None:
            h = self.projection(h).clamp(-self.proj_clip, self.proj_clip)
        return h, c


def advance_cells(gates: tuple[Tensor, Tensor, Tensor, Tensor], c: Tensor, cell_clip: float) -> tuple[Tensor, Tensor]:
    """Compute the cells of a step.

    Args:
        gates: input, candidate, forget and output, each (R, C), before their functions.
        c: (R, C) cells before the step.
        cell_clip: bound of the cells' absolute value.

    Returns:
        The cells' output (R, C), not yet projected, and the next c.
    """
    i, j, f, o = gates
    c = sigmoid(f) * c + sigmoid(i) * torch.tanh(j)
    c = c.clamp(-cell_clip, cell_clip)
    return sigmoid(o) * torch.tanh(c), c


def run_steps(
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    gates_x: Tensor,
    packing: Packing,
    h: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer's step over all steps of packed sentences.

    Args:
        step: as `ClippedProjectedLstm.step`.
        gates_x: (N, 4·C) input projections, packed.
        packing: of these sentences.
        h: (B, P) recurrent output before the first step, in the packing's order.
        c: (B, C) cells before the first step, likewise.

    Returns:
        As `ClippedProjectedLstm.forward`.
    """
    outputs = []
    for gates, n_rows in zip(torch.split(gates_x, list(packing.step_sizes)), packing.step_sizes, strict=True):
        h_step, c_step = step(gates, h[:n_rows], c[:n_rows])
        outputs.append(h_step)
        h, c = _replace_first(h, h_step), _replace_first(c, c_step)
    return torch.cat(outputs) if outputs else gates_x.new_zeros(0, h.shape[-1]), h, c


def _replace_first(rows: Tensor, first: Tensor) -> Tensor:
    """Sentences that have ended keep their rows."""
    return first if len(first) == len(rows) else torch.cat([first, rows[len(first) :]])
