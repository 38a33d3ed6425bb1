"""From messages of `bilm_api.v1` to what is to be done; what is wrong with a sentence is found behind this file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from bilm_api.constants import Priority, Reason
from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import LayerMix, Pooling, Selection

from bilm_server.embedding.preprocessing import check_mix
from bilm_server.errors import RefusalError
from bilm_server.inference.types import AskedTokens, Call, Sentence
from bilm_server.served_model import EmbeddingModel

# What isn't set means what the client's defaults mean, so that a first call by hand needs no options.
_PLAIN_LAYERS: Mapping[int, Literal["all", "top", "average"]] = {
    embed_pb2.LAYERS_UNSPECIFIED: "all",
    embed_pb2.LAYERS_ALL: "all",
    embed_pb2.LAYERS_TOP: "top",
    embed_pb2.LAYERS_AVERAGE: "average",
}
_POOLINGS: Mapping[int, Pooling] = {
    embed_pb2.POOLING_UNSPECIFIED: "none",
    embed_pb2.POOLING_NONE: "none",
    embed_pb2.POOLING_MEAN: "mean",
    embed_pb2.POOLING_MAX: "max",
}
_DATA_TYPES: Mapping[int, DataType] = {
    embed_pb2.DATA_TYPE_UNSPECIFIED: "float32",
    embed_pb2.DATA_TYPE_FLOAT32: "float32",
    embed_pb2.DATA_TYPE_FLOAT16: "float16",
    embed_pb2.DATA_TYPE_BFLOAT16: "bfloat16",
}
_PRIORITIES: Mapping[int, Priority] = {
    embed_pb2.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    embed_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    embed_pb2.PRIORITY_BATCH: Priority.BATCH,
}


def parse_priority(value: int) -> Priority:
    """Return how urgent a request is.

    Raises:
        RefusalError: PRIORITY_INVALID.
    """
    priority = _PRIORITIES.get(value)
    if priority is None:
        raise RefusalError(Reason.PRIORITY_INVALID, _unsupported("priority", value, _PRIORITIES))
    return priority


_SPAN_UNITS: Mapping[int, str] = {
    embed_pb2.SPAN_UNIT_UNSPECIFIED: "tokens",
    embed_pb2.SPAN_UNIT_TOKENS: "tokens",
    embed_pb2.SPAN_UNIT_BYTES: "bytes",
}


def parse_options(options: embed_pb2.EmbedOptions, model: EmbeddingModel) -> OutputSpec:
    """Return what a request's options ask of the engine.

    Raises:
        RefusalError: naming what is unknown or doesn't fit the model.
    """
    pooling, data_type = _POOLINGS.get(options.pooling), _DATA_TYPES.get(options.data_type)
    if pooling is None:
        raise RefusalError(Reason.POOLING_INVALID, _unsupported("pooling", options.pooling, _POOLINGS))
    if data_type is None:
        raise RefusalError(Reason.DATA_TYPE_INVALID, _unsupported("data_type", options.data_type, _DATA_TYPES))
    return OutputSpec(Selection(_parse_layers(options, model), pooling, options.l2_normalize), data_type)


def new_sentence(sentence: embed_pb2.Sentence, output: OutputSpec, call: Call) -> Sentence:
    """Return a message's sentence, not checked and not tokenised."""
    content: str | Sequence[str] | None = None
    match sentence.WhichOneof("input"):
        case "text":
            content = sentence.text
        case "tokens":
            content = sentence.tokens.tokens
    asked: AskedTokens | None = None
    match sentence.WhichOneof("selection"):
        case "rows":
            asked = AskedTokens(rows=sentence.rows.rows)
        case "spans":
            unit = sentence.spans.unit
            asked = AskedTokens(spans=sentence.spans.spans, unit=_SPAN_UNITS.get(unit, str(unit)))
    return Sentence(call, content, output, sentence.state, sentence.return_state, asked)


def _unsupported(field: str, value: int, known: Iterable[int]) -> str:
    return f"{field}: unsupported value {value} (expected one of {', '.join(map(str, sorted(known)))})"


def _parse_layers(
    options: embed_pb2.EmbedOptions, model: EmbeddingModel
) -> Literal["all", "top", "average"] | LayerMix:
    if options.layers == embed_pb2.LAYERS_MIX:
        return _parse_mix(options, model.layer_count)
    layers = _PLAIN_LAYERS.get(options.layers)
    if layers is None:
        known = (*_PLAIN_LAYERS, embed_pb2.LAYERS_MIX)
        raise RefusalError(Reason.LAYERS_INVALID, _unsupported("layers", options.layers, known))
    if options.HasField("mix"):
        raise RefusalError(Reason.MIX_INVALID, "mix: only goes with LAYERS_MIX")
    return layers


def _parse_mix(options: embed_pb2.EmbedOptions, layer_count: int) -> LayerMix:
    if not options.HasField("mix"):
        raise RefusalError(Reason.MIX_INVALID, "mix: LAYERS_MIX needs it")
    mix = options.mix
    gamma = mix.gamma if mix.HasField("gamma") else 1.0
    return check_mix(LayerMix(tuple(mix.weights), gamma, mix.layer_norm), layer_count)
