"""States that sentences bring to a device and take with them: of all sentences of a round in one transfer each way.

Legend: L LSTM layers, 2 directions (forward, backward), n sentences, P projection, C cells.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.engine.backend import Memory
from bilm_model.engine.host_ring import Arrival, HostRing
from bilm_model.engine.state import LstmState
from bilm_model.engine.transfer import Sender, Transfers, transfers_of

MAX_BYTES = 64 * 2**20
"""Of the ring of states: 900 at original size."""
_FIRST_BYTES = 2**20


class ArrivingStates:
    """States on their way to the host."""

    def __init__(self, arrival: Arrival, shapes: Sequence[tuple[int, ...]]) -> None:
        """Set the copy, which has h (n, L, 2, P), then c (n, L, 2, C) in float32."""
        self._arrival, self._shapes = arrival, shapes

    def done(self) -> bool:
        """Return whether they have arrived."""
        return self._arrival.done()

    def states(self) -> list[LstmState]:
        """Return them, in memory of their own; once, and wait for them."""
        numbers: NDArray[np.float32] = self._arrival.bytes().view(np.float32)
        n_h = int(np.prod(self._shapes[0]))
        h, c = (part.reshape(shape) for part, shape in zip((numbers[:n_h], numbers[n_h:]), self._shapes, strict=True))
        found = [(h[i].copy(), c[i].copy()) for i in range(len(h))]
        self._arrival.release()
        return found


class StateTransfer:
    """Writes states into lanes of an engine's memory, and reads them."""

    def __init__(self, device: torch.device, transfers: Transfers | None = None) -> None:
        """Set the device of the memory, and how to reach it; None: as it is reached."""
        transfers = transfers or transfers_of(device)
        self._sender = Sender(device, transfers)
        self._ring = HostRing(transfers, _FIRST_BYTES, MAX_BYTES)

    @torch.inference_mode()
    def write(self, memory: Memory, lanes: Sequence[int], states: Sequence[LstmState]) -> None:
        """Write h (L, 2, P) and c (L, 2, C) of sentences into their lanes."""
        parts = [np.stack(each, axis=2, dtype=np.float32, casting="same_kind") for each in zip(*states, strict=True)]
        index, h, c = self._sender.send([np.array(lanes), *parts])
        memory.h.index_copy_(2, index, h)
        memory.c.index_copy_(2, index, c)

    @torch.inference_mode()
    def read(self, memory: Memory, lanes: Sequence[int]) -> ArrivingStates:
        """Return the states in lanes, on their way to the host."""
        (index,) = self._sender.send([np.array(lanes)])
        stored = (memory.h, memory.c)
        shapes = [(len(lanes), *each.shape[:2], each.shape[3]) for each in stored]
        sizes = [int(np.prod(shape)) for shape in shapes]
        numbers = torch.empty(sum(sizes), device=index.device)
        for source, shape, target in zip(stored, shapes, numbers.split(sizes), strict=True):
            target.view(shape).copy_(_by_sentence(source.index_select(2, index)))
        return ArrivingStates(self._ring.receive(numbers.view(torch.uint8)), shapes)


def _by_sentence(states: Tensor) -> Tensor:
    """(L, 2, n, …) -> (n, L, 2, …)."""
    return states.permute(2, 0, 1, 3)
