"""A call's parameters: what is to be returned, and how long the call may wait."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from bilm_api.constants import Priority, Reason
from bilm_api.inference import open_inference_pb2 as pb
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import LayerMix, Pooling, Selection

from bilm_server.embedding.preprocessing import check_mix
from bilm_server.errors import RefusalError
from bilm_server.inference.types import NO_DEADLINE_S
from bilm_server.served_model import EmbeddingModel

T = TypeVar("T")

_MIX: Final = "mix"
_LAYERS: Final[Mapping[str, Literal["all", "top", "average", "mix"]]] = {
    "all": "all", "top": "top", "average": "average", _MIX: "mix"
}  # fmt: skip
_POOLINGS: Final[Mapping[str, Pooling]] = {"none": "none", "mean": "mean", "max": "max"}
_PRIORITIES: Final[Mapping[str, Priority]] = {priority.value: priority for priority in Priority}
_DATA_TYPES: Final[Mapping[str, DataType]] = {"FP32": "float32", "FP16": "float16"}
_MIX_PARAMETERS: Final = ("mix_weights", "mix_gamma", "mix_layer_norm")
_NAMES: Final = ("layers", *_MIX_PARAMETERS, "pooling", "l2_normalize", "data_type", "timeout", "priority")

_WHOLE_NUMBERS: Final = ("int64_param", "uint64_param")
_NUMBERS: Final = ("double_param", *_WHOLE_NUMBERS)
_DECIMAL: Final = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # float() takes 1_0, too
_SHOWN_CHARACTERS: Final = 40

Parameters = Mapping[str, pb.InferParameter]


@dataclass(frozen=True)
class CallParameters:
    """What a call's parameters say.

    Attributes:
        output: what to return for each sentence.
        timeout_s: until the work on the call must have begun.
        priority: how urgent it is.
    """

    output: OutputSpec
    timeout_s: float = NO_DEADLINE_S
    priority: Priority = Priority.INTERACTIVE


def parse_parameters(given: Parameters, model: EmbeddingModel) -> CallParameters:
    """Return what a call's parameters say; those that aren't set mean what unset options of an `Embed` mean.

    Raises:
        RefusalError: naming the parameter that is unknown, of another type, or doesn't fit the model.
    """
    check_names("parameters", given, _NAMES)
    pooling = _choice(given, "pooling", "none", _POOLINGS, Reason.POOLING_INVALID)
    data_type = _choice(given, "data_type", "FP32", _DATA_TYPES, Reason.DATA_TYPE_INVALID)
    selection = Selection(_parse_layers(given, model), pooling, bool(_value(given, "l2_normalize", ("bool_param",))))
    timeout_us = _whole_number(given, "timeout")
    timeout_s = timeout_us / 1e6 if timeout_us else NO_DEADLINE_S
    return CallParameters(OutputSpec(selection, data_type), timeout_s, _parse_priority(given))


def check_names(what: str, found: Collection[str], known: Collection[str]) -> None:
    """Make sure that only known names are there.

    Raises:
        RefusalError: MALFORMED_REQUEST.
    """
    expected = f"expected {'some of ' + ', '.join(known) if known else 'none'}"
    if len(found) > len(known):
        raise RefusalError(Reason.MALFORMED_REQUEST, f"{what}: {len(found)} names ({expected})")
    for name in found:
        if name not in known:
            raise RefusalError(Reason.MALFORMED_REQUEST, f"{what}: unknown name {shown(name)} ({expected})")


def shown(name: str) -> str:
    """Return a caller's word as a message may quote it; never for what may be a sentence."""
    return ascii(name) if len(name) <= _SHOWN_CHARACTERS else f"of {len(name)} characters"


def _value(given: Parameters, name: str, kinds: Collection[str]) -> Any:
    """Return a parameter's value, of one of these kinds; None: it isn't there."""
    if name not in given:  # a look-up in a map of protobuf's would add it
        return None
    parameter = given[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in kinds:
        expected = " or ".join(kinds)
        raise RefusalError(Reason.MALFORMED_REQUEST, f"{name}: expected {expected}, found {kind or 'no value'}")
    return getattr(parameter, kind)


def _choice(given: Parameters, name: str, default: str, known: Mapping[str, T], reason: Reason) -> T:
    value = _value(given, name, ("string_param",))
    if value is None:
        return known[default]
    if value not in known:
        raise RefusalError(reason, f"{name}: unsupported value {shown(value)} (expected one of {', '.join(known)})")
    return known[value]


def _whole_number(given: Parameters, name: str) -> int:
    value = _value(given, name, _WHOLE_NUMBERS) or 0
    if value < 0:
        raise RefusalError(Reason.MALFORMED_REQUEST, f"{name}: expected a number from 0, found {value}")
    return int(value)


def _parse_priority(given: Parameters) -> Priority:
    """Return a priority by name, or by Triton's numbers, of which lower ones come first and 0 is not set."""
    value = _value(given, "priority", ("string_param", *_WHOLE_NUMBERS))
    if isinstance(value, str):
        return _choice(given, "priority", "", _PRIORITIES, Reason.PRIORITY_INVALID)
    return Priority.BATCH if _whole_number(given, "priority") > 1 else Priority.INTERACTIVE


def _parse_layers(given: Parameters, model: EmbeddingModel) -> Literal["all", "top", "average"] | LayerMix:
    layers = _choice(given, "layers", "all", _LAYERS, Reason.LAYERS_INVALID)
    if layers == "mix":
        return _parse_mix(given, model.layer_count)
    if found := [name for name in _MIX_PARAMETERS if name in given]:
        raise RefusalError(Reason.MIX_INVALID, f"{found[0]}: only goes with layers = {_MIX}")
    return layers


def _parse_mix(given: Parameters, layer_count: int) -> LayerMix:
    listed = _value(given, "mix_weights", ("string_param",)) or ""
    expected = f"mix_weights: expected {layer_count} numbers with commas between them"
    n_found = listed.count(",") + 1 if listed else 0
    if n_found != layer_count:
        raise RefusalError(Reason.MIX_INVALID, f"{expected}, found {n_found}")
    numbers = [part.strip() for part in listed.split(",")]
    if not all(map(_DECIMAL.fullmatch, numbers)):
        raise RefusalError(Reason.MIX_INVALID, f"{expected}, found something else")
    weights = tuple(map(float, numbers))
    gamma = _value(given, "mix_gamma", _NUMBERS)
    layer_norm = bool(_value(given, "mix_layer_norm", ("bool_param",)))
    return check_mix(LayerMix(weights, 1.0 if gamma is None else float(gamma), layer_norm), layer_count)
