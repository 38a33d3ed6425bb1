"""A back end that computes nothing: what is left of a round is planning, joining and collecting.

Works with the back-end protocol of each source tree that is compared, so it imports none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilm_model.engine.backend import Memory

_BLOCK_ROWS = 288
"""As the CPU back end has it."""


class IdleBackend:
    """A `Backend` whose rounds take no time.

    Args:
        bilm: not used.
        memory: keeps the values that it has; they are set to zero once, so that its pages exist.
        rest: not used.
    """

    def __init__(self, bilm: Any, memory: "Memory", *rest: Any) -> None:
        self.memory = memory
        self.block_rows = _BLOCK_ROWS
        self.name = "computes nothing"
        self.paths: dict[str, str] = {}

    def prepare(self) -> None:
        """Write to all of the memory once."""
        for tensor in (self.memory.vectors, self.memory.outputs, self.memory.h, self.memory.c):
            tensor.zero_()

    def encode(self, entries: Any, ids: Any) -> None:
        """Do nothing."""

    def forget(self, entries: Any) -> None:
        """Do nothing."""

    def run(self, plan: Any, entries: Any) -> None:
        """Do nothing."""
