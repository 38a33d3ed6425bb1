"""From the client's messages to sentences of the engine; what is wrong with a sentence has the server's reason."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import grpc
from bilm_api.constants import MAX_CHOSEN_PER_TOKEN, Reason
from bilm_api.v1 import embed_pb2 as pb
from bilm_client.errors import InvalidRequestError
from bilm_model.characters import is_truncated
from bilm_model.engine.choices import choose_byte_spans, choose_rows, choose_spans
from bilm_model.engine.types import DataType, OutputSpec, State, TokenChoice
from bilm_model.errors import AlignmentError, ChoiceError, StateError
from bilm_model.scalar_mix import LayerMix, Pooling, Selection
from bilm_model.tokenization.types import Tokenizer

from bilm_local.loading import LocalModel

T = TypeVar("T")

MAX_TOKENS = 32_768
"""Of a sentence, as a server has it by default; never more than the engine can take."""

_LAYERS: Mapping[int, Literal["all", "top", "average"]] = {
    pb.LAYERS_ALL: "all", pb.LAYERS_TOP: "top", pb.LAYERS_AVERAGE: "average",
}  # fmt: skip
_POOLINGS: Mapping[int, Pooling] = {pb.POOLING_NONE: "none", pb.POOLING_MEAN: "mean", pb.POOLING_MAX: "max"}
_DATA_TYPES: Mapping[int, DataType] = {
    pb.DATA_TYPE_FLOAT32: "float32", pb.DATA_TYPE_FLOAT16: "float16", pb.DATA_TYPE_BFLOAT16: "bfloat16",
}  # fmt: skip


class RefusedSentenceError(Exception):
    """A sentence can't be computed.

    Attributes:
        reason: Why, as a server has it.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(eq=False, slots=True)
class LocalSentence:
    """A sentence that can be computed (`EngineSentence`).

    Attributes:
        tokens: None empty, without boundaries.
        output: What to return.
        starts: Byte offsets of the tokens, where it came as text.
        ends: Byte offsets after the tokens, where it came as text.
        truncated: Whether a token has more bytes than the model reads.
        choice: For which of its tokens to return the output; None: for all.
        state: To continue from; None: the zero state.
        return_state: Whether the state after it is needed.
        deferrable: Whether a round may leave it out.
    """

    tokens: Sequence[str]
    output: OutputSpec
    starts: Sequence[int] = ()
    ends: Sequence[int] = ()
    truncated: bool = False
    choice: TokenChoice | None = None
    state: State | None = None
    return_state: bool = False
    deferrable: bool = False

    def of_rows(self, values: Sequence[T]) -> Sequence[T]:
        """Return what belongs to the rows that come back, of something that each token has."""
        if self.output.pooled or self.choice is None:
            return values
        return [values[row] for row in self.choice.rows.tolist()]


def output_of(options: pb.EmbedOptions) -> OutputSpec:
    """Return what the client's options ask of the engine; the client has checked them.

    Raises:
        InvalidRequestError: A number of the mix is too large for float32.
    """
    layers: Literal["all", "top", "average"] | LayerMix
    if options.layers == pb.LAYERS_MIX:
        layers = LayerMix(tuple(options.mix.weights), options.mix.gamma, options.mix.layer_norm)
        if not all(map(math.isfinite, (*layers.weights, layers.gamma))):
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, Reason.MIX_INVALID.value
            raise InvalidRequestError("mix: expected finite numbers, in float32", code=code, reason=reason)
    else:
        layers = _LAYERS[options.layers]
    selection = Selection(layers, _POOLINGS[options.pooling], options.l2_normalize)
    return OutputSpec(selection, _DATA_TYPES[options.data_type])


def prepare(message: pb.Sentence, output: OutputSpec, model: LocalModel) -> LocalSentence:
    """Return the sentence of a message, tokenised and checked.

    Raises:
        RefusedSentenceError: What is wrong with it.
    """
    sentence = _tokenised(message, output, model.tokenizer)
    limit = max_tokens(model)
    _check(sentence, limit)
    sentence.truncated = any(map(is_truncated, sentence.tokens))
    sentence.return_state = message.return_state
    if message.state:
        sentence.state = _decoded(message.state, model)
    if message.WhichOneof("selection") is not None:
        try:
            sentence.choice = _chosen(message, sentence, min(limit, MAX_CHOSEN_PER_TOKEN * len(sentence.tokens)))
        except ChoiceError as error:
            raise RefusedSentenceError(Reason.SELECTION_INVALID, str(error)) from error
    return sentence


def max_tokens(model: LocalModel) -> int:
    """Return how many tokens a sentence may have; the engine takes two boundaries with them."""
    return min(MAX_TOKENS, model.engine.max_steps - 2)


def _tokenised(message: pb.Sentence, output: OutputSpec, tokenizer: Tokenizer) -> LocalSentence:
    if message.WhichOneof("input") != "text":
        return LocalSentence(tuple(message.tokens.tokens[:]), output)
    try:
        found = tokenizer(message.text)
    except AlignmentError as error:
        raise RefusedSentenceError(Reason.TEXT_NOT_TOKENIZABLE, str(error)) from error
    return LocalSentence(found.tokens, output, found.starts, found.ends)


def _check(sentence: LocalSentence, limit: int) -> None:
    tokens = sentence.tokens
    if len(tokens) > limit:
        raise RefusedSentenceError(Reason.SENTENCE_TOO_LONG, f"{len(tokens)} tokens are more than {limit}")
    if not all(tokens):
        raise RefusedSentenceError(Reason.TOKEN_EMPTY, f"token {tokens.index('')} is empty")
    if not tokens and sentence.output.pooled:
        raise RefusedSentenceError(Reason.POOLING_EMPTY, "a sentence without tokens can't be pooled")


def _decoded(state: bytes, model: LocalModel) -> State:
    codec = model.engine.state_codec
    if codec is None:
        raise RefusedSentenceError(Reason.STATE_INVALID, "state: this model has none")
    try:
        return codec.decode(state)
    except StateError as error:
        raise RefusedSentenceError(Reason.STATE_INVALID, str(error)) from error


def _chosen(message: pb.Sentence, sentence: LocalSentence, limit: int) -> TokenChoice:
    if message.HasField("rows"):
        return choose_rows(message.rows.rows, sentence.tokens, limit)
    if message.spans.unit == pb.SPAN_UNIT_BYTES:
        n_bytes = len(message.text.encode())
        return choose_byte_spans(message.spans.spans, n_bytes, sentence.starts, sentence.ends, limit)
    return choose_spans(message.spans.spans, len(sentence.tokens), limit)
