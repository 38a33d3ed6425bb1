"""Sentences of a batch laid out by time step, longest first, so that a recurrent layer sees no padding.

Two layouts of the same N rows: 'flat', sentence after sentence, as everything outside the recurrence has it; and
'packed', step after step, at each step the rows that still run (as in torch's `PackedSequence`). Because the longest
sentences come first, those that still run at a step are the first rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """How B sentences of given lengths are packed.

    Attributes:
        order: (B,) which sentence each row is.
        step_sizes: rows that run at each step.
        forward: (N,) for each packed row its place in the flat layout, reading forward.
        backward: (N,) the same, each sentence read from its end.
    """

    order: Tensor
    step_sizes: tuple[int, ...]
    forward: Tensor
    backward: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Packing":
        """Pack sentences of these lengths (each at least 0)."""
        length = np.asarray(lengths, dtype=np.int64)
        start = np.concatenate([[0], np.cumsum(length)[:-1]])
        order = np.argsort(-length, kind="stable")
        length, start = length[order], start[order]
        steps = np.arange(length[0] if len(length) else 0)
        running = steps[:, None] < length[None, :]
        step, row = np.nonzero(running)
        forward, backward = start[row] + step, start[row] + length[row] - 1 - step
        order_, forward_, backward_ = (torch.from_numpy(index).to(device) for index in (order, forward, backward))
        return cls(order_, tuple(running.sum(axis=1).tolist()), forward_, backward_)

    @cached_property
    def inverse_order(self) -> Tensor:
        """(B,) the row of each sentence."""
        return torch.argsort(self.order)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return the places in the flat layout, for the forward and for the backward direction."""
        return self.forward, self.backward
