"""What the RPC methods work with."""

from dataclasses import dataclass

from bilm_server.admission import Admission, pushback_ms
from bilm_server.caller_limits import CallerLimits
from bilm_server.config import ServerConfig
from bilm_server.conversions import Conversions
from bilm_server.inference import InferenceThread
from bilm_server.requests import SentenceLimits
from bilm_server.served_model import ServedModel
from bilm_server.stream_room import StreamRoom


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
    conversions: Conversions
    admission: Admission
    stream_admission: StreamRoom
    caller_limits: CallerLimits

    @property
    def sentence_limits(self) -> SentenceLimits:
        """How long a sentence may be."""
        return SentenceLimits(self.config.max_tokens_per_sentence, self.config.max_text_kib * 1024)

    def retry_after_ms(self) -> int:
        """When there will be room again: the time that half of what waits takes."""
        return pushback_ms(self.admission.used.tokens / self.inference.steps_per_s / 2)
