"""/v1/embed: everything that `Embed` has, in JSON; the response also as raw tensors."""

import struct
from binascii import Error, a2b_base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from bilm_api.constants import Priority, Reason
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.scalar_mix import LayerMix, Pooling, Selection

from bilm_server.embedding.conversions import request_weight
from bilm_server.embedding.preprocessing import RequestLimits, check_mix
from bilm_server.embedding.registry import Registry
from bilm_server.inference.types import AskedTokens, Call, Sentence
from bilm_server.observability.call_record import current_call
from bilm_server.protocols.http.embed_responses import JsonFormat, RawTensors
from bilm_server.protocols.http.encodings import ENCODINGS, Encoding
from bilm_server.protocols.http.fields import BodyFields, check_count, parse_json, wrong
from bilm_server.protocols.http.messages import HttpRequest, HttpResponse

TENSORS: Final = "application/octet-stream"
"""What a request accepts that wants raw tensors."""

_FIELDS = ("model", "expected_model_version", "options", "sentences", "encoding_format", "priority")
_OPTIONS = ("layers", "mix", "pooling", "l2_normalize", "data_type", "omit_tokens")
_MIX = ("weights", "gamma", "layer_norm")
_SENTENCE = ("text", "tokens", "state", "return_state", "rows", "spans", "span_unit")

_LAYERS: Final[Mapping[str, Literal["all", "top", "average", "mix"]]] = {
    "all": "all",
    "top": "top",
    "average": "average",
    "mix": "mix",
}
_POOLINGS: Final[Mapping[str, Pooling]] = {"none": "none", "mean": "mean", "max": "max"}
_DATA_TYPES: Final[Mapping[str, DataType]] = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
_SPAN_UNITS: Final[Mapping[str, str]] = {"tokens": "tokens", "bytes": "bytes"}
_MAX_INDEX: Final = 2**32 - 1


@dataclass(frozen=True)
class EmbedQuery:
    """What a body asks for.

    Attributes:
        model: name, "" for the default.
        version: that the client relies on, "" for any.
        sentences: not checked and not tokenised.
        output: of all of them.
        omit_tokens: whether the client knows the tokens.
        encoding: of the vectors in JSON.
        priority: how urgent it is.
    """

    model: str
    version: str
    sentences: list[Sentence]
    output: OutputSpec
    omit_tokens: bool
    encoding: Encoding
    priority: Priority


class Embed:
    """The endpoint."""

    def __init__(self, models: Registry) -> None:
        """Set what embeds."""
        self._models = models

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Embed all sentences of a request; one that is at fault by itself has an error for a result."""
        models, body, call = self._models, request.body, Call(request.deadline_s)
        weight, ceiling = request_weight(len(body), 0), current_call().priority
        query = await models.conversions.request(weight, lambda: parse_query(body, call, models.limits), ceiling)
        embedder = models.find(query.model, query.version)
        embedder.prioritise(call, query.priority)
        layers = query.output.selection.layers
        if isinstance(layers, LayerMix):
            check_mix(layers, embedder.model.layer_count)
        if TENSORS in request.headers.get("accept", ""):
            tensors = RawTensors(embedder.model, query.omit_tokens)
            return HttpResponse(await embedder.embed(query.sentences, len(body), tensors), content_type=TENSORS)
        wire = JsonFormat(embedder.model, query.omit_tokens, query.encoding)
        return HttpResponse(await embedder.embed(query.sentences, len(body), wire))


def parse_query(body: bytes, call: Call, limits: RequestLimits) -> EmbedQuery:
    """Return what a body asks for; in any thread.

    Raises:
        RefusalError: naming the field at fault.
    """
    fields = parse_json(body)
    fields.check_names(_FIELDS)
    options = fields.object("options")
    options.check_names(_OPTIONS)
    output = _output(options)
    found = fields.get("sentences") or []
    if not isinstance(found, list):
        raise wrong("sentences", "expected a list of objects")
    check_count(limits, len(found), "sentences")
    return EmbedQuery(
        model=fields.text("model"),
        version=fields.text("expected_model_version"),
        sentences=[_sentence(each, f"sentences[{i}]", call, output) for i, each in enumerate(found)],
        output=output,
        omit_tokens=options.flag("omit_tokens"),
        encoding=fields.choice("encoding_format", ENCODINGS, "float"),
        priority=fields.priority(),
    )


def _output(options: BodyFields) -> OutputSpec:
    kind = options.choice("layers", _LAYERS, "all", Reason.LAYERS_INVALID)
    if (options.get("mix") is not None) != (kind == "mix"):
        raise wrong(options.path("mix"), "goes with layers mix, and with nothing else", Reason.MIX_INVALID)
    layers = _mix(options.object("mix")) if kind == "mix" else kind
    pooling = options.choice("pooling", _POOLINGS, "none", Reason.POOLING_INVALID)
    data_type = options.choice("data_type", _DATA_TYPES, "float32", Reason.DATA_TYPE_INVALID)
    return OutputSpec(Selection(layers, pooling, options.flag("l2_normalize")), data_type)


def _mix(fields: BodyFields) -> LayerMix:
    fields.check_names(_MIX)
    weights, gamma = fields.get("weights"), fields.get("gamma")
    if not isinstance(weights, list):
        raise wrong(fields.path("weights"), "expected a list of numbers", Reason.MIX_INVALID)
    numbers = [_float32(weight, fields.path("weights")) for weight in weights]
    factor = 1.0 if gamma is None else _float32(gamma, fields.path("gamma"))
    return LayerMix(tuple(numbers), factor, fields.flag("layer_norm"))


def _float32(value: object, path: str) -> float:
    """Return a number rounded as the contract's `float` has it, so that a mix has the same bits through each door."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(path, "expected numbers", Reason.MIX_INVALID)
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        raise wrong(path, "expected finite numbers of single precision", Reason.MIX_INVALID) from None


def _sentence(value: object, path: str, call: Call, output: OutputSpec) -> Sentence:
    fields = BodyFields(value, path)
    fields.check_names(_SENTENCE)
    text, tokens = fields.get("text"), fields.get("tokens")
    if text is not None and tokens is not None:
        raise wrong(path, "expected text or tokens, not both")
    content: Any = fields.text("text") if text is not None else tokens
    if tokens is not None and not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        raise wrong(fields.path("tokens"), "expected a list of strings")
    return Sentence(call, content, output, _state(fields), fields.flag("return_state"), _asked(fields))


class _Span(NamedTuple):
    """A `Span`."""

    start: int
    end: int


def _asked(fields: BodyFields) -> AskedTokens | None:
    rows, spans = fields.get("rows"), fields.get("spans")
    unit = fields.choice("span_unit", _SPAN_UNITS, "tokens")
    if fields.get("span_unit") is not None and spans is None:
        raise wrong(fields.path("span_unit"), "goes with spans, and with nothing else")
    if rows is not None and spans is not None:
        raise wrong(fields.path("rows"), "expected rows or spans, not both")
    if rows is not None:
        if not _are_indices(rows):
            raise wrong(fields.path("rows"), "expected a list of indices")
        return AskedTokens(rows=rows)
    if spans is None:
        return None
    if not (isinstance(spans, list) and all(_are_indices(span) and len(span) == 2 for span in spans)):
        raise wrong(fields.path("spans"), "expected a list of pairs [start, end]")
    return AskedTokens(spans=[_Span(*span) for span in spans], unit=unit)


def _are_indices(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each <= _MAX_INDEX for each in value)


def _state(fields: BodyFields) -> bytes:
    try:
        return a2b_base64(fields.text("state"), strict_mode=True)
    except (Error, ValueError):
        raise wrong(fields.path("state"), "expected base64") from None
