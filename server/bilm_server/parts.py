"""What the RPC methods work with."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from bilm_server.admission import Admission
from bilm_server.caller_limits import CallerLimits
from bilm_server.config import ServerConfig
from bilm_server.inference import InferenceThread
from bilm_server.requests import SentenceLimits
from bilm_server.served_model import ServedModel

R = TypeVar("R")

INLINE_BYTES = 4 * 1024
"""Conversions up to this size take less than handing them to another thread and back."""

TOKENISING_WEIGHT = 4
"""So much longer than other conversions of the same size tokenising takes: 1.3 ms for a KiB."""

_MIN_PUSHBACK_MS, _MAX_PUSHBACK_MS = 20, 10_000  # never 0: a gRPC client hangs on that until its deadline


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a running server.

    Attributes:
        config: the server's.
        model: the only one.
        inference: computes.
        conversions: threads for conversions that would hold the event loop.
        admission: of Embed calls.
        stream_admission: of all streams' items.
        caller_limits: of each caller by itself.
    """

    config: ServerConfig
    model: ServedModel
    inference: InferenceThread
    conversions: Executor
    admission: Admission
    stream_admission: Admission
    caller_limits: CallerLimits

    @property
    def sentence_limits(self) -> SentenceLimits:
        """How long a sentence may be."""
        return SentenceLimits(self.config.max_tokens_per_sentence, self.config.max_text_kib * 1024)

    async def convert(self, n_bytes: int, function: Callable[[], R]) -> R:
        """Runs a conversion, in another thread if it is large."""
        if n_bytes <= INLINE_BYTES:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self.conversions, function)

    def retry_after_ms(self) -> int:
        """When there will be room again: the time that half of what waits takes."""
        seconds = self.admission.used.tokens / self.inference.steps_per_s / 2
        return max(_MIN_PUSHBACK_MS, min(_MAX_PUSHBACK_MS, int(1000 * seconds)))
