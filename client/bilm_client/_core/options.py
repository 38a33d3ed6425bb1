"""What to return for each sentence: checked once, then rendered for the wire.

Shapes: L layers, T tokens, D width.
"""

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from bilm_api.constants import Feature
from bilm_api.v1 import embed_pb2 as pb

_log = logging.getLogger(__name__)

LayersName = Literal["all", "top", "average", "mix"]
PoolName = Literal["none", "mean", "max"]
DTypeName = Literal["float32", "float16", "bfloat16"]
OnError = Literal["raise", "return"]
PriorityName = Literal["interactive", "batch"]

LAYERS = {
    "all": pb.LAYERS_ALL,
    "top": pb.LAYERS_TOP,
    "average": pb.LAYERS_AVERAGE,
    "mix": pb.LAYERS_MIX,
}
POOLING = {"none": pb.POOLING_NONE, "mean": pb.POOLING_MEAN, "max": pb.POOLING_MAX}
DATA_TYPES = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
}
_ON_ERROR = {"raise": True, "return": False}
_PRIORITIES = {"interactive": pb.PRIORITY_UNSPECIFIED, "batch": pb.PRIORITY_BATCH}
_V = TypeVar("_V")


@dataclass(frozen=True)
class ScalarMix:
    """Parameters of the ELMo scalar mix: gamma * sum_k softmax(weights)_k * layer_k.

    Attributes:
        weights: Weights before the softmax, one for each layer; finite.
        gamma: Factor of the result; finite.
        layer_norm: Normalise each layer of a sentence to mean 0 and deviation 1 first.

    Raises:
        ValueError: A number isn't finite, or there are no weights.
    """

    weights: tuple[float, ...]
    gamma: float = 1.0
    layer_norm: bool = False

    def __init__(self, weights: Iterable[float], gamma: float = 1.0, layer_norm: bool = False) -> None:
        object.__setattr__(self, "weights", tuple(float(weight) for weight in weights))
        object.__setattr__(self, "gamma", float(gamma))
        object.__setattr__(self, "layer_norm", bool(layer_norm))
        if not self.weights:
            raise ValueError("weights must hold one number for each layer, got none")
        if not all(map(math.isfinite, (*self.weights, self.gamma))):
            raise ValueError(f"weights and gamma must be finite, got {self.weights} and {self.gamma}")

    def to_proto(self) -> pb.ScalarMix:
        """Return the message for the value object."""
        return pb.ScalarMix(weights=self.weights, gamma=self.gamma, layer_norm=self.layer_norm)


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options of `embed` and `embed_stream`."""

    layers: LayersName = "all"
    pool: PoolName = "none"
    dtype: DTypeName = "float32"
    mix: ScalarMix | None = None
    l2_normalize: bool = False
    on_error: OnError = "raise"
    priority: PriorityName = "interactive"

    def __post_init__(self) -> None:
        _choose("layers", self.layers, LAYERS)
        _choose("pool", self.pool, POOLING)
        _choose("dtype", self.dtype, DATA_TYPES)
        _choose("on_error", self.on_error, _ON_ERROR)
        _choose("priority", self.priority, _PRIORITIES)
        if not isinstance(self.mix, ScalarMix | None):
            raise TypeError(f"mix must be a ScalarMix, got {type(self.mix).__name__}")
        if (self.mix is not None) != (self.layers == "mix"):
            given = "none" if self.mix is None else "one"
            raise ValueError(f"mix must be given with layers='mix' and only then, got {given} with {self.layers!r}")
        if not isinstance(self.l2_normalize, bool):
            raise TypeError(f"l2_normalize must be a bool, got {self.l2_normalize!r}")

    @property
    def raises(self) -> bool:
        """Whether a failed sentence raises."""
        return self.on_error == "raise"

    @property
    def needs_features(self) -> bool:
        """Whether what is sent depends on what the server can do."""
        return self.priority != "interactive"

    @property
    def pooled(self) -> bool:
        """Whether tokens are pooled."""
        return self.pool != "none"

    @property
    def token_axis(self) -> int:
        """The axis of the tokens, or spans, where there is one; as a shape: [L] T D."""
        return 1 if self.layers == "all" else 0

    @property
    def axes(self) -> int:
        """Axes of a tensor without spans: [L] [T] D."""
        return 1 + (self.layers == "all") + (not self.pooled)

    @property
    def item_bytes(self) -> int:
        """Bytes of a number on the wire."""
        return 4 if self.dtype == "float32" else 2

    @property
    def data_type(self) -> pb.DataType:
        """The number format on the wire."""
        return DATA_TYPES[self.dtype]

    def layers_returned(self, layer_count: int) -> int:
        """Return layers in a tensor, of the `layer_count` that the model has."""
        return layer_count if self.layers == "all" else 1

    def to_proto(self, *, omit_tokens: bool = False) -> pb.EmbedOptions:
        """Return the message for the value object."""
        return pb.EmbedOptions(
            layers=LAYERS[self.layers],
            mix=None if self.mix is None else self.mix.to_proto(),
            pooling=POOLING[self.pool],
            l2_normalize=self.l2_normalize,
            data_type=self.data_type,
            omit_tokens=omit_tokens,
        )

    def check_layer_count(self, layer_count: int) -> None:
        """Check the mix against the model.

        Raises:
            ValueError: The mix has another number of weights than the model has layers.
        """
        if self.mix is not None and len(self.mix.weights) != layer_count:
            raise ValueError(f"mix must have {layer_count} weights for this model, got {len(self.mix.weights)}")


class StatedPriority:
    """Which priority the messages of a client's calls state.

    A priority is a wish: for a server that doesn't know it, batch calls are as all others, and that is logged once.
    """

    def __init__(self) -> None:
        self._logged = False

    def of(self, options: Options, features: Collection[str]) -> pb.Priority:
        """Return the priority on the wire, for a server with these features."""
        if not options.needs_features or Feature.PRIORITY in features:
            return _PRIORITIES[options.priority]
        if not self._logged:
            self._logged = True
            _log.warning("priority: the server doesn't know it, so batch calls are treated as interactive ones")
        return pb.PRIORITY_UNSPECIFIED


def _choose(name: str, value: object, table: dict[str, _V]) -> _V:
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, table))}, got {value!r}")
    return table[value]
