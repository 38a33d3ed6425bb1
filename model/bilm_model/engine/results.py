"""From layers on a device to what was asked for, on the host."""

from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.engine.sentences import EmbeddedSentence
from bilm_model.engine.transfer import HostCopy
from bilm_model.engine.types import DataType, EngineResult, S

_TORCH_TYPES: dict[DataType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def converted(vectors: Tensor, data_type: DataType) -> Tensor:
    """Return a copy in the number format, on the same device; bfloat16 as int16 of its bits, which numpy has.

    Copied even where nothing changes: a part of several sentences' results would keep all of them in memory.
    """
    copied = vectors.to(_TORCH_TYPES[data_type], copy=True, memory_format=torch.contiguous_format)
    return copied.view(torch.int16) if data_type == "bfloat16" else copied


@dataclass(frozen=True, eq=False)
class Transfer(Generic[S]):
    """A result on its way from the device to the host.

    Attributes:
        sentence: Whose it is.
        vectors: As its `OutputSpec` says.
        state: h and c, where they were asked for.
    """

    sentence: S
    vectors: HostCopy
    state: tuple[HostCopy, HostCopy] | None

    @classmethod
    def of(cls, sentence: S, embedded: EmbeddedSentence) -> "Transfer[S]":
        """Select and convert what was asked for, and start the copies."""
        vectors = converted(sentence.output.selection(embedded.layers), sentence.output.data_type)
        state = (HostCopy(embedded.h.clone()), HostCopy(embedded.c.clone())) if sentence.return_state else None
        return cls(sentence, HostCopy(vectors), state)

    @property
    def done(self) -> bool:
        """Whether everything has arrived."""
        return self.vectors.done() and all(copy.done() for copy in self.state or ())

    def result(self) -> EngineResult[S]:
        """Return the result; waits for what has not arrived."""
        array = self.vectors.array()
        state = None if self.state is None else (_floats(self.state[0]), _floats(self.state[1]))
        return EngineResult(self.sentence, array.astype(array.dtype.newbyteorder("<"), copy=False), state)


def _floats(copy: HostCopy) -> NDArray[np.float32]:
    return copy.array().astype(np.float32, copy=False)
