"""What the engine does between products, plainly, in torch: the fallback, and what the fused kernels are tested with.

Legend: R rows, N steps or tokens, C cells, P projection, F filters, W windows of each token.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bilm_model.affine import sigmoid


@dataclass(frozen=True, eq=False)
class CellWork:
    """What a cell is to do in a round.

    Attributes:
        gates_x: (any, 4·C) what inputs add to the gates, biases and the forget gate's +1 included.
        index: (N,) int64, the row of `gates_x` for each step.
        h: (≥ R, P) float32 recurrent outputs before the round; may be changed.
        c: (any, C) float32 cells, changed in place.
        slots: (R,) int64, the row of `c` for each row.
        fresh: (N,) bool, the step starts from h = c = 0, whatever `h` and `c` hold.
        sizes: rows at each tick, never growing.
    """

    gates_x: Tensor
    index: Tensor
    h: Tensor
    c: Tensor
    slots: Tensor
    fresh: Tensor
    sizes: tuple[int, ...]


class Elementwise(Protocol):
    """The arithmetic between products."""

    @property
    def name(self) -> str:
        """What it is, for people to read."""

    @property
    def path(self) -> str:
        """The same as a label of the metric `bilm_kernel_path`."""

    def lstm(
        self,
        gates_h: Tensor,
        gates_x: Tensor,
        index: Tensor,
        c: Tensor,
        slots: Tensor,
        *,
        fresh: Tensor,
        clip: float,
        out: Tensor,
    ) -> None:
        """One step of R cells.

        Args:
            gates_h: (≥ R, 4·C) what the recurrent output adds to the gates input, candidate, forget, output.
            gates_x: (any, 4·C) what inputs add, biases and the forget gate's +1 included.
            index: (R,) int64, the row of `gates_x` for each row.
            c: (any, C) float32 cells, changed in place.
            slots: (R,) int64, all different, the row of `c` for each row.
            fresh: (R,) bool, rows whose `gates_h` and `c` count as 0, whatever they hold; both may be changed.
            clip: bound of the cells.
            out: (≥ R, C) gets σ(o)·tanh(c) in its first R rows; the others stay as they are.
        """

    def outputs(
        self, y: Tensor, x: Tensor | None, places: Tensor, *, returns_sum: bool, returned: Tensor, following: Tensor
    ) -> None:
        """What a layer returns, and what the next one reads.

        Args:
            y: (N, P) what the cells give, in the products' format.
            x: (≥ N, P) float32, added to y; None: nothing is.
            places: (N,) int64, all different.
            returns_sum: whether the layer returns y + x; otherwise y.
            returned: (any, P) float32, gets that in the rows `places`.
            following: (≥ N, P) float32, gets y + x in its first N rows, and zeros in the others.
        """

    def keep(self, y: Tensor, last: Tensor, h: Tensor, slots: Tensor) -> None:
        """Copy the rows `last` (R,) of y (N, P) to the rows `slots` (R,), all different, of h (any, P) float32."""

    def highway(self, x: Tensor, z: Tensor) -> Tensor:
        """X (N, F) float32, z (N, 2·F), the gate and the transform -> x + σ(gate)·(relu(transform) − x), float32."""

    def peaks(
        self, responses: Tensor, n_windows: int, floor: Tensor, bias: Tensor, activation: str, *, out: Tensor
    ) -> None:
        """Find each filter's largest response in each token.

        Args:
            responses: (≥ N·W, F) token after token, window after window.
            n_windows: W, of each token.
            floor: (F,) float32, the peaks at least; −∞ where there is no such bound.
            bias: (F,) float32, added to the peaks.
            activation: "relu" or "tanh", after that.
            out: (N, F) float32.
        """


class TorchElementwise:
    """One torch operator after another."""

    name = "torch's elementwise operators"
    path = "torch"

    def lstm(
        self,
        gates_h: Tensor,
        gates_x: Tensor,
        index: Tensor,
        c: Tensor,
        slots: Tensor,
        *,
        fresh: Tensor,
        clip: float,
        out: Tensor,
    ) -> None:
        """See `Elementwise`."""
        n_rows = len(index)
        gates_h = gates_h[:n_rows].float().masked_fill(fresh[:, None], 0.0)
        i, j, f, o = (gates_h + gates_x[index].float()).chunk(4, dim=-1)
        before = c[slots].masked_fill_(fresh[:, None], 0.0)
        cells = (sigmoid(f) * before + sigmoid(i) * torch.tanh(j)).clamp_(-clip, clip)
        c[slots] = cells
        out[:n_rows] = sigmoid(o) * torch.tanh(cells)

    def outputs(
        self, y: Tensor, x: Tensor | None, places: Tensor, *, returns_sum: bool, returned: Tensor, following: Tensor
    ) -> None:
        """See `Elementwise`."""
        n_steps, y = len(y), y.float()
        following[:n_steps] = y if x is None else y + x[:n_steps]
        following[n_steps:] = 0.0
        returned.index_copy_(0, places, following[:n_steps] if returns_sum else y)

    def keep(self, y: Tensor, last: Tensor, h: Tensor, slots: Tensor) -> None:
        """See `Elementwise`."""
        h.index_copy_(0, slots, y.index_select(0, last).float())

    def highway(self, x: Tensor, z: Tensor) -> Tensor:
        """See `Elementwise`."""
        gate, transform = z.float().chunk(2, dim=-1)
        return x + sigmoid(gate) * (torch.relu(transform) - x)

    def peaks(
        self, responses: Tensor, n_windows: int, floor: Tensor, bias: Tensor, activation: str, *, out: Tensor
    ) -> None:
        """See `Elementwise`."""
        n_tokens, n_filters = out.shape
        largest = responses[: n_tokens * n_windows].view(n_tokens, n_windows, n_filters).float().amax(1)
        peaks = torch.maximum(largest, floor) + bias
        out.copy_(torch.relu(peaks) if activation == "relu" else torch.tanh(peaks))
