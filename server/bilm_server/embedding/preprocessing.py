"""Sentences before they are computed: priced, checked, tokenised. Nothing behind this file sees bad input."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from bilm_api.constants import MAX_RESPONSE_BYTES, Reason
from bilm_model.alphabet import MAX_TOKEN_BYTES
from bilm_model.characters import is_truncated
from bilm_model.engine.types import DataType, OutputSpec
from bilm_model.errors import AlignmentError, StateError
from bilm_model.scalar_mix import LayerMix
from bilm_model.tokenization.deferred import DeferredTokenizer

from bilm_server.config import ServerConfig
from bilm_server.embedding.conversions import INLINE_BYTES, request_weight
from bilm_server.embedding.token_choices import choose
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Sentence
from bilm_server.served_model import EmbeddingModel

_ITEM_BYTES: Mapping[DataType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

_MAX_FLOAT32 = 3.4028234663852886e38

_NEVER_TRUNCATED = MAX_TOKEN_BYTES // 4
"""Characters of a token that is read whole whatever they are: none has more than 4 bytes."""

_BYTES_PER_TOKEN = 6
"""Of text, the white space included: what English has."""


@dataclass(frozen=True)
class RequestLimits:
    """How much one request, one sentence and one stream may have.

    Attributes:
        sentences: of a request.
        tokens: of a request.
        response_bytes: of a request's response.
        sentence_tokens: of a sentence.
        text_bytes: of a sentence in UTF-8, where it comes as raw text.
        stream_items: of a stream, read and not answered.
    """

    sentences: int
    tokens: int
    response_bytes: int
    sentence_tokens: int
    text_bytes: int
    stream_items: int

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """Return the limits that a configuration sets."""
        return cls(
            sentences=config.max_sentences_per_request,
            tokens=config.max_tokens_per_request,
            response_bytes=MAX_RESPONSE_BYTES,
            sentence_tokens=config.max_tokens_per_sentence,
            text_bytes=config.max_text_kib * 1024,
            stream_items=config.max_stream_items_in_flight,
        )

    def check_count(self, n_sentences: int) -> None:
        """Check how many sentences a request has.

        Raises:
            RefusalError: SENTENCES_MISSING or TOO_MANY_SENTENCES.
        """
        if not 0 < n_sentences <= self.sentences:
            reason = Reason.TOO_MANY_SENTENCES if n_sentences else Reason.SENTENCES_MISSING
            raise RefusalError(reason, f"sentences: found {n_sentences} (expected 1 to {self.sentences})")


class Preprocessing:
    """Checks, prices and tokenises sentences for one model; without state, so that any thread may use it."""

    def __init__(self, model: EmbeddingModel, limits: RequestLimits) -> None:
        """Set the model that the sentences are for, and what they may have."""
        self._model, self.limits = model, limits

    def price(self, sentences: Iterable[Sentence]) -> int:
        """Return the tokens that a request is taken to have until it is tokenised, no more than it may have.

        A sentence that will be refused for its length costs nothing.

        Raises:
            RefusalError: TOO_MANY_TOKENS, if those that are given as tokens are too many already.
        """
        given, guessed = 0, 0
        for sentence in sentences:
            if isinstance(sentence.content, str):
                guessed += _text_price(sentence.content, self.limits.text_bytes)
            elif sentence.content is not None and (n_tokens := len(sentence.content)) <= self.limits.sentence_tokens:
                given += n_tokens
        if given > self.limits.tokens:
            raise RefusalError(Reason.TOO_MANY_TOKENS, f"{given} tokens are more than {self.limits.tokens}")
        return min(given + guessed, self.limits.tokens)

    def weight(self, sentences: Sequence[Sentence], n_bytes: int) -> int:
        """Return the `request_weight` of a request of so many bytes.

        A text that comes before its tokenizer is loaded waits for that, so it is never prepared on the event loop.
        """
        weight, tokenizer = request_weight(n_bytes, text_bytes(sentences)), self._model.tokenizer
        if not isinstance(tokenizer, DeferredTokenizer) or tokenizer.loaded:
            return weight
        has_text = any(isinstance(sentence.content, str) for sentence in sentences)
        return max(weight, INLINE_BYTES + 1) if has_text else weight

    def prepare_all(self, sentences: Sequence[Sentence]) -> list[RefusalError | None]:
        """Prepare the sentences of a request; return what is wrong with each.

        Raises:
            RefusalError: TOO_MANY_TOKENS, if they have too many together.
        """
        n_tokens, limit = 0, self.limits.tokens
        refusals: list[RefusalError | None] = []
        for sentence in sentences:
            try:
                self.prepare(sentence)
            except RefusalError as error:
                refusals.append(error)
                continue
            refusals.append(None)
            n_tokens += len(sentence.tokens)
            if sentence.choice is not None:  # what is chosen again and again takes time, too
                n_tokens += max(0, len(sentence.choice.rows) - len(sentence.tokens))
            if n_tokens > limit:  # tokenising the rest would be for nothing
                raise RefusalError(Reason.TOO_MANY_TOKENS, f"{n_tokens} tokens and more are more than {limit}")
        return refusals

    def prepare(self, sentence: Sentence) -> None:
        """Check a sentence, once, and cut it into tokens.

        Raises:
            RefusalError: what is wrong with this sentence.
        """
        match sentence.content:
            case str(text):
                _check_text(text, self.limits.text_bytes)
                self._tokenize(sentence, text)
            case None:
                raise RefusalError(Reason.SENTENCE_MISSING, "the sentence has neither text nor tokens")
            case tokens:
                sentence.tokens = tuple(tokens[:])  # a slice of protobuf's takes half as long as its iterator
        _check_tokens(sentence, self.limits.sentence_tokens)
        if max(map(len, sentence.tokens), default=0) > _NEVER_TRUNCATED:
            sentence.truncated = any(map(is_truncated, [t for t in sentence.tokens if len(t) > _NEVER_TRUNCATED]))
        if sentence.state_bytes or sentence.return_state:
            self._decode_state(sentence)
        if sentence.asked is not None:
            n_bytes = _utf8_bytes(sentence.content) if isinstance(sentence.content, str) else None
            sentence.choice = choose(sentence.asked, sentence, n_bytes, self.limits.sentence_tokens)
        # They can keep a whole message in memory
        sentence.content, sentence.state_bytes, sentence.asked = None, b"", None

    def computed_bytes(self, *sentences: Sentence) -> int:
        """Return the bytes of prepared sentences' vectors and of the states that they ask for."""
        n_bytes, output, pooled, n_row_bytes = 0, None, False, 0
        for sentence in sentences:
            if sentence.output is not output:  # a call's sentences share it
                output = sentence.output
                pooled, n_row_bytes = output.pooled, row_bytes(output, self._model)
            if sentence.choice is not None:
                n_bytes += n_row_bytes * (sentence.row_count or 1)
            else:
                n_bytes += n_row_bytes if pooled else n_row_bytes * len(sentence.tokens)
            if sentence.return_state:
                n_bytes += self._model.state_bytes
        return n_bytes

    def _tokenize(self, sentence: Sentence, text: str) -> None:
        try:
            found = self._model.tokenizer(text)
        except AlignmentError as error:
            raise RefusalError(Reason.TEXT_NOT_TOKENIZABLE, str(error)) from error
        sentence.tokens, sentence.starts, sentence.ends = found.tokens, found.starts, found.ends

    def _decode_state(self, sentence: Sentence) -> None:
        codec = self._model.state_codec
        if codec is None:
            raise RefusalError(Reason.STATE_INVALID, "state: this model has none")
        if not sentence.state_bytes:
            return
        try:
            sentence.state = codec.decode(sentence.state_bytes)
        except StateError as error:
            raise RefusalError(Reason.STATE_INVALID, str(error)) from error


def check_mix(mix: LayerMix, layer_count: int) -> LayerMix:
    """Return a mix that a request asks for, if it fits a model of so many layers.

    Raises:
        RefusalError: MIX_INVALID.
    """
    if len(mix.weights) != layer_count:
        raise RefusalError(Reason.MIX_INVALID, f"mix.weights: expected {layer_count}, found {len(mix.weights)}")
    if not all(abs(number) <= _MAX_FLOAT32 for number in (*mix.weights, mix.gamma)):  # NaN compares as False
        raise RefusalError(Reason.MIX_INVALID, "mix: expected finite numbers, in float32")
    return mix


def row_bytes(output: OutputSpec, model: EmbeddingModel) -> int:
    """Return the bytes of one token's vectors; pooled, of those of the sentence, or of a span."""
    n_layers = model.layer_count if output.selection.layers == "all" else 1
    return n_layers * model.width * item_bytes(output)


def item_bytes(output: OutputSpec) -> int:
    """Return the bytes of one number."""
    return _ITEM_BYTES[output.data_type]


def text_bytes(sentences: Iterable[Sentence]) -> int:
    """Return how many bytes are to be tokenised."""
    return sum(_utf8_bytes(sentence.content) for sentence in sentences if isinstance(sentence.content, str))


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _text_price(text: str, max_bytes: int) -> int:
    n_bytes = _utf8_bytes(text)
    if n_bytes > max_bytes or text.isspace():
        return 0
    return -(-n_bytes // _BYTES_PER_TOKEN)


def _check_text(text: str, max_bytes: int) -> None:
    n_bytes = _utf8_bytes(text)
    if n_bytes > max_bytes:
        raise RefusalError(Reason.SENTENCE_TOO_LONG, f"the text has {n_bytes} bytes, more than {max_bytes}")


def _check_tokens(sentence: Sentence, max_tokens: int) -> None:
    tokens = sentence.tokens
    if len(tokens) > max_tokens:
        raise RefusalError(Reason.SENTENCE_TOO_LONG, f"{len(tokens)} tokens are more than {max_tokens}")
    if not all(tokens):
        raise RefusalError(Reason.TOKEN_EMPTY, f"token {tokens.index('')} is empty")
    if not tokens and sentence.output.pooled:
        raise RefusalError(Reason.POOLING_EMPTY, "a sentence without tokens can't be pooled")
