"""From the wire to what is to be done, checked: nothing behind this file sees bad input."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2
from bilm_model.characters import is_truncated
from bilm_model.engine.types import DataType, OutputSpec, State
from bilm_model.errors import AlignmentError, StateError
from bilm_model.scalar_mix import Pooling, ScalarMix, Selection

from bilm_server.errors import RefusalError
from bilm_server.observability.call_record import current_call
from bilm_server.served_model import ServedModel

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
_ITEM_BYTES: Mapping[DataType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

# Generous bounds of what protobuf adds: a sentence's tags, lengths and shape; a token's tag, length and two offsets.
_SENTENCE_OVERHEAD_BYTES, _TOKEN_OVERHEAD_BYTES = 128, 16


@dataclass(frozen=True)
class Wanted:
    """What to return for each sentence.

    Attributes:
        selection: of the layers.
        data_type: of the numbers.
        omit_tokens: whether the caller knows the tokens.
    """

    selection: Selection
    data_type: DataType
    omit_tokens: bool

    @property
    def output(self) -> OutputSpec:
        """What an engine returns."""
        return OutputSpec(self.selection, self.data_type)

    @property
    def pooled(self) -> bool:
        """Whether there is one vector a sentence."""
        return self.selection.pooling != "none"

    def row_bytes(self, model: ServedModel) -> int:
        """Bytes of one token's (or, pooled, of the sentence's) vectors."""
        n_layers = model.config.layer_count if self.selection.layers == "all" else 1
        return n_layers * model.config.width * _ITEM_BYTES[self.data_type]


@dataclass(frozen=True)
class PreparedSentence:
    """A sentence that can be computed.

    Attributes:
        tokens: as they will be embedded.
        starts: byte offsets, where the input was text.
        ends: likewise.
        truncated: whether a token has more bytes than are read.
        state: to go on from, or None.
        return_state: whether to return the state after it.
    """

    tokens: tuple[str, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    truncated: bool
    state: State | None
    return_state: bool

    @property
    def n_steps(self) -> int:
        """Tokens and boundaries; without tokens there are no boundaries."""
        return len(self.tokens) + 2 if self.tokens else 0

    def answer_bytes(self, wanted: Wanted, model: ServedModel) -> int:
        """An upper bound of the answer's size on the wire."""
        n_rows = 1 if wanted.pooled else len(self.tokens)
        text = 0 if wanted.omit_tokens else sum(4 * len(token) for token in self.tokens)
        state = model.state_bytes if self.return_state else 0
        overhead = _SENTENCE_OVERHEAD_BYTES + _TOKEN_OVERHEAD_BYTES * len(self.tokens)
        return n_rows * wanted.row_bytes(model) + text + state + overhead


def check_model(name: str, expected_version: str, model: ServedModel) -> None:
    """Makes sure that the caller means this model.

    Raises:
        RefusalError: MODEL_NOT_FOUND or MODEL_VERSION_MISMATCH.
    """
    if name not in ("", model.name):
        raise RefusalError(Reason.MODEL_NOT_FOUND, f"the model served here is {model.name}")
    current_call().model = model.name
    if expected_version not in ("", model.version):
        raise RefusalError(Reason.MODEL_VERSION_MISMATCH, f"the version served here is {model.version}")


def parse_options(options: embed_pb2.EmbedOptions, model: ServedModel) -> Wanted:
    """Reads the options of a request.

    Raises:
        RefusalError: naming what is unknown or doesn't fit the model.
    """
    pooling, data_type = _POOLINGS.get(options.pooling), _DATA_TYPES.get(options.data_type)
    if pooling is None:
        raise RefusalError(Reason.POOLING_INVALID, _unsupported("pooling", options.pooling, _POOLINGS))
    if data_type is None:
        raise RefusalError(Reason.DATA_TYPE_INVALID, _unsupported("data_type", options.data_type, _DATA_TYPES))
    selection = Selection(_parse_layers(options, model), pooling, options.l2_normalize)
    return Wanted(selection, data_type, options.omit_tokens)


def _unsupported(field: str, value: int, known: Iterable[int]) -> str:
    return f"{field}: unsupported value {value} (expected one of {', '.join(map(str, sorted(known)))})"


def _parse_layers(options: embed_pb2.EmbedOptions, model: ServedModel) -> Literal["all", "top", "average"] | ScalarMix:
    if options.layers == embed_pb2.LAYERS_MIX:
        return _parse_mix(options, model.config.layer_count)
    layers = _PLAIN_LAYERS.get(options.layers)
    if layers is None:
        known = (*_PLAIN_LAYERS, embed_pb2.LAYERS_MIX)
        raise RefusalError(Reason.LAYERS_INVALID, _unsupported("layers", options.layers, known))
    if options.HasField("mix"):
        raise RefusalError(Reason.MIX_INVALID, "mix: only goes with LAYERS_MIX")
    return layers


def _parse_mix(options: embed_pb2.EmbedOptions, layer_count: int) -> ScalarMix:
    if not options.HasField("mix"):
        raise RefusalError(Reason.MIX_INVALID, "mix: LAYERS_MIX needs it")
    mix = options.mix
    gamma = mix.gamma if mix.HasField("gamma") else 1.0
    if len(mix.weights) != layer_count:
        raise RefusalError(Reason.MIX_INVALID, f"mix.weights: expected {layer_count}, found {len(mix.weights)}")
    if not all(map(math.isfinite, (*mix.weights, gamma))):
        raise RefusalError(Reason.MIX_INVALID, "mix: expected finite numbers")
    return ScalarMix(tuple(mix.weights), gamma, mix.layer_norm)


@dataclass(frozen=True)
class SentenceLimits:
    """How long a sentence may be.

    Attributes:
        tokens: of it.
        text_bytes: in UTF-8, where it comes as raw text.
    """

    tokens: int
    text_bytes: int


_BYTES_PER_TOKEN = 6
"""Of text, the white space included: what English has."""


def priced_tokens(sentences: Iterable[embed_pb2.Sentence], limits: SentenceLimits) -> tuple[int, int]:
    """What sentences are taken to cost before they are cut into tokens.

    A sentence that will be refused for its length costs nothing.

    Returns:
        Those that are given as tokens, and those that texts have as far as their bytes tell.
    """
    given, guessed = 0, 0
    for sentence in sentences:
        if sentence.HasField("text"):
            guessed += _text_price(sentence.text, limits.text_bytes)
        elif (n_tokens := len(sentence.tokens.tokens)) <= limits.tokens:
            given += n_tokens
    return given, guessed


def _text_price(text: str, max_bytes: int) -> int:
    n_bytes = len(text) if text.isascii() else len(text.encode())
    if n_bytes > max_bytes or text.isspace():
        return 0
    return -(-n_bytes // _BYTES_PER_TOKEN)


def prepare_sentence(
    sentence: embed_pb2.Sentence, wanted: Wanted, model: ServedModel, limits: SentenceLimits
) -> PreparedSentence:
    """Checks a sentence and cuts it into tokens.

    Raises:
        RefusalError: what is wrong with this sentence.
    """
    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    match sentence.WhichOneof("input"):
        case "text":
            _check_text(sentence.text, limits.text_bytes)
            try:
                text = model.tokenizer(sentence.text)
            except AlignmentError as error:
                raise RefusalError(Reason.TEXT_NOT_TOKENIZABLE, str(error)) from error
            tokens, starts, ends = text.tokens, text.starts, text.ends
        case "tokens":
            tokens = tuple(sentence.tokens.tokens)
        case _:
            raise RefusalError(Reason.SENTENCE_MISSING, "the sentence has neither text nor tokens")
    _check_tokens(tokens, wanted, limits.tokens)
    return PreparedSentence(
        tokens=tokens,
        starts=starts,
        ends=ends,
        truncated=any(map(is_truncated, tokens)),
        state=_decode_state(sentence.state, model),
        return_state=sentence.return_state,
    )


def _check_text(text: str, max_bytes: int) -> None:
    n_bytes = len(text.encode())
    if n_bytes > max_bytes:
        raise RefusalError(Reason.SENTENCE_TOO_LONG, f"the text has {n_bytes} bytes, more than {max_bytes}")


def _check_tokens(tokens: tuple[str, ...], wanted: Wanted, max_tokens: int) -> None:
    if len(tokens) > max_tokens:
        raise RefusalError(Reason.SENTENCE_TOO_LONG, f"{len(tokens)} tokens are more than {max_tokens}")
    if "" in tokens:
        raise RefusalError(Reason.TOKEN_EMPTY, f"token {tokens.index('')} is empty")
    if wanted.pooled and not tokens:
        raise RefusalError(Reason.POOLING_EMPTY, "a sentence without tokens can't be pooled")


def _decode_state(state: bytes, model: ServedModel) -> State | None:
    if not state:
        return None
    codec = model.engine.state_codec
    if codec is None:
        raise RefusalError(Reason.STATE_INVALID, "this model has no states")
    try:
        return codec.decode(state)
    except StateError as error:
        raise RefusalError(Reason.STATE_INVALID, str(error)) from error
