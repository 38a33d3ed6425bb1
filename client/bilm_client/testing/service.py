"""A service without a model: messages in, messages out, vectors from hashes.

Shapes: L layers, T tokens, D width.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from bilm_api.constants import ERROR_DOMAIN, Feature, Reason
from bilm_api.v1 import embed_pb2 as pb
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

MODEL_NAME = "fake"
MODEL_VERSION = "fake-1"
MAX_TOKEN_BYTES = 48
_STATE_MAGIC = b"bilm-fake-state:"
_DIGEST_BYTES = 16
STATE_BYTES = len(_STATE_MAGIC) + _DIGEST_BYTES
_INVALID_ARGUMENT = 3


class SentenceFailure(Exception):  # noqa: N818 - not an error of the caller's: it becomes the sentence's result
    """A sentence that gets a status instead of vectors."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FakeService:
    """Answers as a server with a model of `layer_count` layers of `width` components would.

    Layer 0 depends on the token alone; the others on the token, its neighbours and the state that came with the
    sentence. Text is cut at white space. Numbers are uniform in [-1, 1) and the same on every machine and release.

    Args:
        layer_count: Layers, the token layer included; at least 1.
        width: Components of a vector; at least 1.
        failures: Reason by sentence (the text, or the tokens joined by spaces) that shall fail.
    """

    def __init__(self, layer_count: int = 3, width: int = 16, failures: Mapping[str, str] | None = None) -> None:
        if layer_count < 1 or width < 1:
            raise ValueError(f"layer_count and width must be at least 1, got {layer_count} and {width}")
        self.layer_count = layer_count
        self.width = width
        self.failures = dict(failures or {})

    def get_model(self) -> pb.GetModelResponse:
        """Return what the service serves."""
        return pb.GetModelResponse(
            name=MODEL_NAME,
            version=MODEL_VERSION,
            layer_count=self.layer_count,
            width=self.width,
            cell_size=self.width,
            parameter_count=0,
            precision="float32",
            backend="fake",
            tokenizer="whitespace",
            max_token_bytes=MAX_TOKEN_BYTES,
            state_bytes=STATE_BYTES,
            limits=pb.Limits(
                max_sentences_per_request=1024,
                max_tokens_per_request=16384,
                max_tokens_per_sentence=16384,
                max_request_bytes=4 * 1024 * 1024,
                max_response_bytes=16 * 1024 * 1024,
                max_stream_items_in_flight=64,
            ),
            server_version="fake",
            features=[Feature.PRIORITY],
        )

    def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Return one result for each sentence."""
        results = [self.embed_sentence(sentence, request.options) for sentence in request.sentences]
        tokens = sum(len(_split(sentence)[0]) for sentence in request.sentences)
        return pb.EmbedResponse(results=results, usage=pb.Usage(tokens=tokens, model_version=MODEL_VERSION))

    def embed_sentence(self, sentence: pb.Sentence, options: pb.EmbedOptions) -> pb.EmbedResult:
        """Return a sentence's embedding or error; options that aren't set mean what they mean to a server."""
        try:
            return pb.EmbedResult(embedding=self._embedding(sentence, _with_defaults(options)))
        except SentenceFailure as failure:
            return pb.EmbedResult(error=error_status(failure.reason, str(failure)))

    def _embedding(self, sentence: pb.Sentence, options: pb.EmbedOptions) -> pb.Embedding:
        tokens, starts, ends = _split(sentence)
        self._check(sentence, tokens, options)
        left = sentence.state.removeprefix(_STATE_MAGIC)
        vectors = _reduced(self._layers(tokens, left), options)
        tensor = pb.Tensor(data=_encoded(vectors, options), shape=vectors.shape, data_type=options.data_type)
        return pb.Embedding(
            tokens=[] if options.omit_tokens else tokens,
            token_starts=starts,
            token_ends=ends,
            truncated=any(len(token.encode()) > MAX_TOKEN_BYTES for token in tokens),
            tensor=tensor,
            state=_state_after(tokens, left) if sentence.return_state else b"",
        )

    def _check(self, sentence: pb.Sentence, tokens: Sequence[str], options: pb.EmbedOptions) -> None:
        name = sentence.text if sentence.HasField("text") else " ".join(tokens)
        if name in self.failures:
            raise SentenceFailure(self.failures[name], f"this sentence shall fail: {name!r}")
        if "" in tokens:
            raise SentenceFailure(Reason.TOKEN_EMPTY, f"token {list(tokens).index('')} is empty")
        if sentence.state and not (sentence.state.startswith(_STATE_MAGIC) and len(sentence.state) == STATE_BYTES):
            raise SentenceFailure(Reason.STATE_INVALID, "the state is not of this model")
        if not tokens and options.pooling != pb.POOLING_NONE:
            raise SentenceFailure(Reason.POOLING_EMPTY, "a sentence without tokens can't be pooled")

    def _layers(self, tokens: Sequence[str], left: bytes) -> FloatArray:
        """(L, T, D)."""
        digests = [left, *map(_digest, tokens), b""]
        layers = np.zeros((self.layer_count, len(tokens), self.width), np.float32)
        for layer in range(self.layer_count):
            for position, (before, (token, after)) in enumerate(zip(digests, pairwise(digests[1:]), strict=False)):
                key = token if layer == 0 else b"|".join((str(layer).encode(), before, token, after))
                layers[layer, position] = _uniform(key, self.width)
        return layers


class FakeStream:
    """The items of one stream, each answered in one message; carries the state where `start` says so."""

    def __init__(self, service: FakeService, start: pb.StreamStart) -> None:
        self._service = service
        self._start = start
        self._state = b""

    def answer(self, item: pb.StreamItem) -> pb.EmbedStreamResponse:
        """Return the whole result of an item."""
        sentence, asked = pb.Sentence(), item.sentence.return_state
        sentence.CopyFrom(item.sentence)
        sentence.state = item.sentence.state or self._state
        sentence.return_state = asked or self._start.carry_state
        result = self._service.embed_sentence(sentence, self._start.options)
        response = pb.EmbedStreamResponse(id=item.id, usage=pb.Usage(model_version=MODEL_VERSION))
        if result.HasField("error"):
            response.error.CopyFrom(result.error)
            return response
        self._state = result.embedding.state if self._start.carry_state else b""
        if not asked:
            result.embedding.ClearField("state")
        rows = _row_count(result.embedding, _with_defaults(self._start.options))
        response.rows.CopyFrom(pb.EmbeddingRows(embedding=result.embedding, total_rows=rows, last=True))
        return response


def _with_defaults(options: pb.EmbedOptions) -> pb.EmbedOptions:
    found = pb.EmbedOptions()
    found.CopyFrom(options)
    found.layers = options.layers or pb.LAYERS_ALL
    found.pooling = options.pooling or pb.POOLING_NONE
    found.data_type = options.data_type or pb.DATA_TYPE_FLOAT32
    return found


def _row_count(embedding: pb.Embedding, options: pb.EmbedOptions) -> int:
    if options.pooling != pb.POOLING_NONE:
        return 1
    return embedding.tensor.shape[1 if options.layers == pb.LAYERS_ALL else 0]


def error_status(reason: str, message: str, code: int = _INVALID_ARGUMENT) -> status_pb2.Status:
    """Return a status as the server makes it, with the reason among the details."""
    detail = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(domain=ERROR_DOMAIN, reason=reason))
    return status_pb2.Status(code=code, message=message, details=[detail])


def _split(sentence: pb.Sentence) -> tuple[list[str], list[int], list[int]]:
    """Tokens, first bytes, ends; the last two are empty where the sentence came as tokens."""
    if not sentence.HasField("text"):
        return list(sentence.tokens.tokens), [], []
    tokens, starts, ends, end = sentence.text.split(), list[int](), list[int](), 0
    text = sentence.text.encode()
    for token in tokens:
        starts.append(text.index(token.encode(), end))
        end = starts[-1] + len(token.encode())
        ends.append(end)
    return tokens, starts, ends


def _digest(token: str) -> bytes:
    return hashlib.blake2b(token.encode(), digest_size=_DIGEST_BYTES).digest()


def _uniform(key: bytes, width: int) -> FloatArray:
    """(D,) of uniform numbers: no generator of numpy's, whose streams may change from release to release."""
    numbers = np.frombuffer(hashlib.shake_256(key).digest(2 * width), "<i2")
    return numbers.astype(np.float32) / np.float32(32768)


def _state_after(tokens: Sequence[str], left: bytes) -> bytes:
    return _STATE_MAGIC + (_digest(tokens[-1]) if tokens else left.ljust(_DIGEST_BYTES, b"\0"))


def _reduced(layers: FloatArray, options: pb.EmbedOptions) -> FloatArray:
    """(L, T, D) to what the options ask for."""
    match options.layers:
        case pb.LAYERS_TOP:
            layers = layers[-1]
        case pb.LAYERS_AVERAGE:
            layers = layers.mean(0)
        case pb.LAYERS_MIX:
            layers = _mixed(layers, options.mix)
    match options.pooling:
        case pb.POOLING_MEAN:
            layers = layers.mean(-2)
        case pb.POOLING_MAX:
            layers = layers.max(-2)
    if options.l2_normalize:
        norms = np.linalg.norm(layers, axis=-1, keepdims=True)
        layers = (layers / np.where(norms == 0, 1, norms)).astype(np.float32)
    return layers


def _mixed(layers: FloatArray, mix: pb.ScalarMix) -> FloatArray:
    """(L, T, D) to (T, D)."""
    if mix.layer_norm and layers.size:
        mean = layers.mean((1, 2), keepdims=True)
        layers = (layers - mean) / layers.std((1, 2), keepdims=True)
    weights = np.exp(np.asarray(mix.weights, np.float64) - max(mix.weights))
    gamma = mix.gamma if mix.HasField("gamma") else 1.0
    mixed: FloatArray = (gamma * np.einsum("l,ltd->td", weights / weights.sum(), layers)).astype(np.float32)
    return mixed


def _encoded(vectors: FloatArray, options: pb.EmbedOptions) -> bytes:
    match options.data_type:
        case pb.DATA_TYPE_FLOAT16:
            return vectors.astype("<f2").tobytes()
        case pb.DATA_TYPE_BFLOAT16:
            bits = np.ascontiguousarray(vectors, "<f4").view("<u4")
            # to nearest, ties to even, as hardware rounds
            rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
            return rounded.tobytes()
        case _:
            return vectors.astype("<f4").tobytes()
