"""A device whose copies end when a test says so, and how many operators it is asked for."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class SlowCopy:
    """A copy that is made when it is waited for; all that were asked for before come first."""

    def __init__(self, transfers: "SlowTransfers", source: Tensor, target: Tensor) -> None:
        self._transfers, self._copy, self.over = transfers, (target, source), False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self._transfers.n_slept += not self.over
        while not self.over:
            self._transfers.next_copy()

    @torch.inference_mode()
    def end(self) -> None:
        target, source = self._copy
        target.copy_(source)
        self.over = True


class SlowTransfers:
    """`Transfers` in order, as late as they may be: until then the memory on both sides is theirs.

    Attributes:
        copies: Those that are not over.
        sizes: Bytes of memory that were allocated.
        n_slept: How often a copy was waited for that was not over.
    """

    def __init__(self) -> None:
        self.copies: list[SlowCopy] = []
        self.sizes: list[int] = []
        self.n_slept = 0

    def host_memory(self, n_bytes: int) -> Tensor:
        self.sizes.append(n_bytes)
        return torch.full((n_bytes,), 0xEE, dtype=torch.uint8)

    def send(self, source: Tensor, target: Tensor) -> SlowCopy:
        self.copies.append(SlowCopy(self, source, target))
        return self.copies[-1]

    fetch = send

    def next_copy(self) -> None:
        self.copies.pop(0).end()


class SlowFetches(SlowTransfers):
    """Only what comes back is late; what is sent is there for the operators that follow."""

    def send(self, source: Tensor, target: Tensor) -> SlowCopy:
        copy = SlowCopy(self, source, target)
        copy.end()
        return copy


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))
