"""The engine: runs batches of sentences on one device.

Legend: L layers with the token layer, T tokens, D width, N rows of the batch, P projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilm_model.bilm import Bilm, BilmState
from bilm_model.characters import NO_TOKEN, character_ids, check_ids, with_boundaries
from bilm_model.engine.packed import pack_products, padded_rows
from bilm_model.errors import ModelError

Precision = Literal["float32", "bfloat16"]

_WARM_UP = (("The", "engine", "warms", "up", "."), ("Twice",))


class AbandonedError(ModelError):
    """Nobody waits for the batch any more; it was left unfinished."""


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence to run.

    Attributes:
        tokens: none empty, without boundaries.
        state: h (L - 1, 2, P) and c (L - 1, 2, C) to go on from; None: zero.
    """

    tokens: Sequence[str]
    state: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None


@dataclass(frozen=True, eq=False)
class EmbeddedSentence:
    """What came of it.

    Attributes:
        layers: (L, T + 2, D) with the boundaries, on the engine's device; (L, 0, D) without tokens.
        h: (L - 1, 2, P) after the sentence, on the engine's device.
        c: (L - 1, 2, C) likewise.
    """

    layers: Tensor
    h: Tensor
    c: Tensor


def _never() -> bool:
    return False


class BatchEngine:
    """Runs a batch through the reference network: no padding, and each different token encoded once.

    Not safe for several threads at once.
    """

    def __init__(self, bilm: Bilm, device: torch.device, precision: Precision) -> None:
        """Takes a float32 biLM over; it is moved and rounded in place."""
        self._device = device
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # on by default; it would keep 10 bits of the convolutions
            torch.backends.cuda.matmul.allow_tf32 = False
        self._bilm = (bilm.to_bfloat16_products() if precision == "bfloat16" else bilm).to(device)
        self._packed = device.type == "cpu" and pack_products(self._bilm)
        self._abandoned: Callable[[], bool] = _never
        for direction in self._bilm.directions:
            for layer in direction.get_submodule("layers").children():
                layer.register_forward_pre_hook(lambda *_: self._stop_if_abandoned())

    @property
    def backend(self) -> str:
        """Device and implementation, for people to read."""
        if self._device.type == "cuda":
            return f"{self._device} ({torch.cuda.get_device_name(self._device)}, torch {torch.__version__})"
        products = "prepacked oneDNN products" if self._packed else "plain products"
        return f"cpu (torch {torch.__version__}, {products}, {torch.get_num_threads()} threads)"

    def warm_up(self) -> None:
        """Runs a real batch, so that the first caller doesn't pay for what torch does once.

        To be called first in the thread that will call `run`.

        Raises:
            ModelError: if the results are not finite numbers.
        """
        # Torch hands the process's number of threads to OpenMP in each thread only when asked for it there; oneDNN,
        # which doesn't ask, would use all cores.
        torch.get_num_threads()
        for embedded in self.run([Sentence(tokens) for tokens in _WARM_UP]):
            if not bool(torch.isfinite(embedded.layers).all()):
                raise ModelError("the warm-up pass gave values that are not finite numbers")

    @torch.inference_mode()
    def run(self, batch: Sequence[Sentence], abandoned: Callable[[], bool] = _never) -> list[EmbeddedSentence]:
        """Embeds a batch.

        Args:
            batch: at least one sentence.
            abandoned: asked between layers whether the work may be left.

        Raises:
            AbandonedError: when `abandoned` said so.
            CharacterError: if a token is empty or not valid Unicode.
        """
        self._abandoned = abandoned
        try:
            return self._run(batch)
        finally:
            self._abandoned = _never  # it may know the batch's callers and, through them, its results

    def _run(self, batch: Sequence[Sentence]) -> list[EmbeddedSentence]:
        sentences = [with_boundaries(sentence.tokens) for sentence in batch]
        lengths = [len(tokens) for tokens in sentences]
        layers, state = self._bilm.contextualize(self._encode(sentences), lengths, self._stack_states(batch))
        parts = torch.split(layers, lengths, dim=1)
        return [EmbeddedSentence(part, state.h[:, :, b], state.c[:, :, b]) for b, part in enumerate(parts)]

    def _encode(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """The vectors (N, P) of all tokens: text repeats its words, so encode what differs and look the rest up."""
        distinct: dict[str, int] = {}
        places = [distinct.setdefault(token, len(distinct)) for tokens in sentences for token in tokens]
        ids = character_ids(distinct)
        check_ids(ids)
        ids = np.pad(ids, ((0, padded_rows(len(ids)) - len(ids)), (0, 0)), constant_values=NO_TOKEN)
        vectors: Tensor = self._bilm.encoder(torch.from_numpy(ids).long().to(self._device))
        return vectors[torch.tensor(places, dtype=torch.long, device=self._device)]

    def _stack_states(self, batch: Sequence[Sentence]) -> BilmState:
        stacked = self._bilm.zero_state(len(batch))
        for b, sentence in enumerate(batch):
            if sentence.state is not None:
                h, c = (torch.tensor(part) for part in sentence.state)
                stacked.h[:, :, b], stacked.c[:, :, b] = h, c
        return stacked

    def _stop_if_abandoned(self) -> None:
        if self._abandoned():
            raise AbandonedError
