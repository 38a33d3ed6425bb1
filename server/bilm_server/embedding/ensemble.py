"""Ensembles: several models embed the same sentences, and their vectors are one behind the other in one result."""

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bilm_model.engine.result_groups import NUMPY_TYPES
from bilm_model.engine.types import DataType, OutputSpec, State, StateCodec
from bilm_model.errors import StateError
from bilm_model.scalar_mix import LayerMix, Selection
from bilm_model.tokenization.types import Tokenizer
from numpy.typing import NDArray

from bilm_server.embedding.conversions import Conversions
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Outcome, Outcomes, Result, Sentence
from bilm_server.inference.worker import Worker
from bilm_server.served_model import EmbeddingModel

_TORCH_TYPES: dict[DataType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_VERSION_LENGTH = 16
_ABSENT = -float("inf")
"""A weight that the softmax makes 0."""


@dataclass(frozen=True, eq=False)
class Member:
    """A model of an ensemble.

    Attributes:
        model: itself.
        worker: what computes by it.
        layers: those that are the ensemble's, ascending.
    """

    model: EmbeddingModel
    worker: Worker
    layers: tuple[int, ...]

    def part_of(self, sentence: Sentence, number: int) -> Sentence:
        """Return what a member, of this number, has to compute for a sentence."""
        output = sentence.output
        normalised_later = output.selection.l2_normalize
        selection = Selection(self._layers(output.selection), output.selection.pooling)
        return Sentence(
            sentence.call,
            None,
            OutputSpec(selection, "float32" if normalised_later else output.data_type),
            return_state=sentence.return_state,
            tokens=sentence.tokens,
            state=None if sentence.state is None else sentence.state[number],
            choice=sentence.choice,
        )

    def picked(self, vectors: NDArray[Any], output: OutputSpec) -> NDArray[Any]:
        """Return what of a member's vectors is the ensemble's."""
        return vectors if output.selection.layers != "all" or self._has_all else vectors[list(self.layers)]

    @property
    def _has_all(self) -> bool:
        return len(self.layers) == self.model.layer_count

    def _layers(self, selection: Selection) -> Any:
        """Return what gives a selection of the ensemble's layers: a mix without the others where it must."""
        layers = selection.layers
        if layers == "all" or (layers == "top" and self.layers[-1] == self.model.layer_count - 1):
            return layers
        if isinstance(layers, LayerMix):
            return LayerMix(self._spread(layers.weights), layers.gamma, layers.layer_norm)
        if layers == "average":
            return layers if self._has_all else LayerMix(self._spread((0.0,) * len(self.layers)))
        return LayerMix(self._spread((*(_ABSENT,) * (len(self.layers) - 1), 0.0)))

    def _spread(self, weights: Sequence[float]) -> tuple[float, ...]:
        own = dict(zip(self.layers, weights, strict=True))
        return tuple(own.get(layer, _ABSENT) for layer in range(self.model.layer_count))


class EnsembleStates:
    """A member's state behind another's (`StateCodec`)."""

    def __init__(self, codecs: Sequence[StateCodec]) -> None:
        """Set the members' codecs."""
        self._codecs = tuple(codecs)

    @property
    def n_bytes(self) -> int:
        """See `StateCodec`."""
        return sum(codec.n_bytes for codec in self._codecs)

    def encode(self, state: State) -> bytes:
        """See `StateCodec`."""
        return b"".join(codec.encode(part) for codec, part in zip(self._codecs, state, strict=True))

    def decode(self, data: bytes) -> State:
        """See `StateCodec`."""
        if len(data) != self.n_bytes:
            raise StateError(f"state: expected {self.n_bytes} bytes, found {len(data)}")
        parts, first = [], 0
        for codec in self._codecs:
            parts.append(codec.decode(data[first : first + codec.n_bytes]))
            first += codec.n_bytes
        return tuple(parts)


class Ensemble:
    """What calls and clients see of an ensemble (`EmbeddingModel`)."""

    cell_size = 0

    def __init__(self, name: str, members: Sequence[Member]) -> None:
        """Describe it.

        Args:
            name: that requests may give.
            members: at least two, with one tokenizer and as many layers of each.
        """
        self.name = name
        models = [member.model for member in members]
        identity = repr([(member.model.version, member.layers) for member in members])
        self.version = hashlib.sha256(identity.encode()).hexdigest()[:_VERSION_LENGTH]
        self.layer_count = len(members[0].layers)
        self.width = sum(model.width for model in models)
        self.parameter_count = sum(model.parameter_count for model in models)
        self.precision = _joined(model.precision for model in models)
        self.backend = models[0].backend
        self.tokenizer: Tokenizer = models[0].tokenizer
        self.inputs, self.contexts = (
            _joined(kinds) for kinds in zip(*((m.inputs, m.contexts) for m in models), strict=True)
        )
        self.members = tuple(model.name for model in models)
        codecs = [model.state_codec for model in models]
        known = [codec for codec in codecs if codec is not None]
        self.state_codec: StateCodec | None = EnsembleStates(known) if len(known) == len(codecs) else None

    @property
    def state_bytes(self) -> int:
        """See `EmbeddingModel`."""
        return 0 if self.state_codec is None else self.state_codec.n_bytes


class EnsembleWorker:
    """Has the members compute a sentence side by side, and puts what they give together (`Worker`)."""

    def __init__(self, members: Sequence[Member], conversions: Conversions) -> None:
        """Set the parts.

        Args:
            members: of the ensemble.
            conversions: threads for what would hold the event loop.
        """
        self._members, self._conversions = tuple(members), conversions
        self._running: set[asyncio.Task[Outcomes]] = set()

    @property
    def steps_per_s(self) -> float:
        """See `Worker`: the members take turns."""
        return 1 / sum(1 / member.worker.steps_per_s for member in self._members)

    @property
    def healthy(self) -> bool:
        """See `Worker`."""
        return all(member.worker.healthy for member in self._members)

    @property
    def idle(self) -> bool:
        """See `Worker`."""
        return not self._running

    def submit(self, sentences: Sequence[Sentence]) -> "asyncio.Future[Outcomes]":
        """See `Worker`."""
        task = asyncio.create_task(self._compute(sentences))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _compute(self, sentences: Sequence[Sentence]) -> Outcomes:
        parts = [
            [member.part_of(sentence, number) for sentence in sentences] for number, member in enumerate(self._members)
        ]
        futures = [member.worker.submit(part) for member, part in zip(self._members, parts, strict=True)]
        try:
            found = await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()  # what one refuses needn't be computed by the others
        n_bytes = sum(each.vectors.nbytes for part in found for each in part if not isinstance(each, RefusalError))
        priority = sentences[0].call.priority
        return await self._conversions.response(n_bytes, lambda: self._together(sentences, found), priority)

    def _together(self, sentences: Sequence[Sentence], found: Sequence[Outcomes]) -> Outcomes:
        return [self._one(sentence, parts) for sentence, *parts in zip(sentences, *found, strict=True)]

    def _one(self, sentence: Sentence, parts: Sequence[Outcome]) -> Outcome:
        results = []
        for part in parts:
            if isinstance(part, RefusalError):
                return part
            results.append(part)
        output = sentence.output
        vectors = np.concatenate(
            [member.picked(each.vectors, output) for member, each in zip(self._members, results, strict=True)], axis=-1
        )
        return Result(
            _normalised(vectors, output.data_type) if output.selection.l2_normalize else vectors,
            tuple(each.state for each in results) if sentence.return_state else None,
            max(each.queue_s for each in results),
            max(each.inference_s for each in results),
        )


def _normalised(vectors: NDArray[Any], data_type: DataType) -> NDArray[Any]:
    """Scale float32 vectors to length 1, and round them as they are asked for; bfloat16 as the engine's results."""
    scaled = F.normalize(torch.from_numpy(vectors), dim=-1).to(_TORCH_TYPES[data_type])
    found = scaled.view(torch.int16) if data_type == "bfloat16" else scaled
    return found.numpy().astype(NUMPY_TYPES[data_type], copy=False)


def _joined(kinds: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(kinds))
