"""A service without a network: messages in, messages out, from one or several models that compute hashes.

Shapes: L layers, T tokens, D width.
"""

from collections.abc import Mapping, Sequence

import grpc
import numpy as np
from bilm_api.constants import STATUS_DETAILS_KEY, Feature, Reason
from bilm_api.v1 import embed_pb2 as pb
from numpy.typing import NDArray

from bilm_client.errors import error_status
from bilm_client.testing.choices import FakeChoice, choice_of
from bilm_client.testing.models import MAX_TOKEN_BYTES, FakeModel, FloatArray


class SentenceFailure(Exception):  # noqa: N818 - not an error of the caller's: it becomes the sentence's result
    """A sentence that gets a status instead of vectors."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class CallFailure(Exception):  # noqa: N818 - not an error of the caller's: it becomes the call's status
    """A call that gets a status instead of a response; has what a call of gRPC has once it has failed."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self._code, self._reason, self._message = code, reason, message

    def code(self) -> grpc.StatusCode:
        """Return the status."""
        return self._code

    def details(self) -> str:
        """Return the message."""
        return self._message

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the metadata with the reason."""
        status = error_status(self._reason, self._message, self._code.value[0])
        return ((STATUS_DETAILS_KEY, status.SerializeToString()),)


class FakeService:
    """Answers as a server with these models would. Text is cut at white space.

    Args:
        models: What is served, the default one first; at least one.
        failures: Reason by sentence (the text, or the tokens joined by spaces) that shall fail.

    Raises:
        ValueError: There is no model, or there are two of one name.
    """

    def __init__(self, models: Sequence[FakeModel] = (FakeModel(),), failures: Mapping[str, str] | None = None) -> None:
        self.models = {model.name: model for model in models}
        if not models or len(self.models) < len(models):
            raise ValueError(f"models must be at least one, each of another name, got {[each.name for each in models]}")
        self.failures = dict(failures or {})

    def model(self, name: str = "", expected_version: str = "") -> FakeModel:
        """Return the model that a call names.

        Raises:
            CallFailure: None of that name is served, or another version of it.
        """
        model = self.models.get(name) if name else next(iter(self.models.values()))
        if model is None:
            served = ", ".join(sorted(self.models))
            message = f"no such model is served here (expected one of {served})"
            raise CallFailure(grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, message)
        if expected_version not in ("", model.version):
            message = f"the version of {model.name} served here is {model.version}"
            raise CallFailure(grpc.StatusCode.FAILED_PRECONDITION, Reason.MODEL_VERSION_MISMATCH, message)
        return model

    def get_model(self, request: pb.GetModelRequest | None = None) -> pb.GetModelResponse:
        """Return what is served by the name of a request; None: by default.

        Raises:
            CallFailure: As `model`.
        """
        request = request or pb.GetModelRequest()
        return self.model(request.model, request.expected_model_version).description()

    def list_models(self) -> pb.ListModelsResponse:
        """Return all that is served, the default one first, the others by name."""
        first, *others = self.models.values()
        ordered = [first, *sorted(others, key=lambda model: model.name)]
        return pb.ListModelsResponse(models=[model.description() for model in ordered])

    def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Return one result for each sentence.

        Raises:
            CallFailure: As `model`.
        """
        model = self.model(request.model, request.expected_model_version)
        results = [self.embed_sentence(sentence, request.options, model) for sentence in request.sentences]
        tokens = sum(len(_split(sentence)[0]) for sentence in request.sentences)
        return pb.EmbedResponse(results=results, usage=pb.Usage(tokens=tokens, model_version=model.version))

    def embed_sentence(
        self, sentence: pb.Sentence, options: pb.EmbedOptions, model: FakeModel | None = None
    ) -> pb.EmbedResult:
        """Return a sentence's embedding or error; options that aren't set mean what they mean to a server.

        Args:
            sentence: The sentence.
            options: What is returned.
            model: Of those that are served; None: the default one.
        """
        try:
            return pb.EmbedResult(embedding=self._embedding(model or self.model(), sentence, _with_defaults(options)))
        except SentenceFailure as failure:
            return pb.EmbedResult(error=error_status(failure.reason, str(failure)))

    def _embedding(self, model: FakeModel, sentence: pb.Sentence, options: pb.EmbedOptions) -> pb.Embedding:
        tokens, starts, ends = _split(sentence)
        self._check(model, sentence, tokens, options)
        choice = _checked_choice(model, sentence, options, len(tokens), list(zip(starts, ends, strict=True)))
        truncated = any(len(token.encode()) > MAX_TOKEN_BYTES for token in tokens)
        state = model.state_after(tokens, sentence.state) if sentence.return_state else b""
        vectors = _reduced(model.layers(tokens, sentence.state), options, choice)
        if choice is not None and options.pooling == pb.POOLING_NONE:
            (rows,) = choice.parts
            tokens = [tokens[row] for row in rows]
            starts, ends = ([each[row] for row in rows] if each else [] for each in (starts, ends))
        tensor = pb.Tensor(data=_encoded(vectors, options), shape=vectors.shape, data_type=options.data_type)
        return pb.Embedding(
            tokens=[] if options.omit_tokens else tokens,
            token_starts=starts,
            token_ends=ends,
            truncated=truncated,
            tensor=tensor,
            state=state,
        )

    def _check(self, model: FakeModel, sentence: pb.Sentence, tokens: Sequence[str], options: pb.EmbedOptions) -> None:
        name = sentence.text if sentence.HasField("text") else " ".join(tokens)
        if name in self.failures:
            raise SentenceFailure(self.failures[name], f"this sentence shall fail: {name!r}")
        if "" in tokens:
            raise SentenceFailure(Reason.TOKEN_EMPTY, f"token {list(tokens).index('')} is empty")
        if not model.accepts_state(sentence.state):
            raise SentenceFailure(Reason.STATE_INVALID, "the state is not of this model")
        if not tokens and options.pooling != pb.POOLING_NONE:
            raise SentenceFailure(Reason.POOLING_EMPTY, "a sentence without tokens can't be pooled")


class FakeStream:
    """The items of one stream, each answered in one message; carries the state where `start` says so.

    Raises:
        CallFailure: As `FakeService.model`.
    """

    def __init__(self, service: FakeService, start: pb.StreamStart) -> None:
        self._service = service
        self._model = service.model(start.model, start.expected_model_version)
        self._start = start
        self._state = b""

    def answer(self, item: pb.StreamItem) -> pb.EmbedStreamResponse:
        """Return the whole result of an item."""
        sentence, asked = pb.Sentence(), item.sentence.return_state
        sentence.CopyFrom(item.sentence)
        sentence.state = item.sentence.state or self._state
        sentence.return_state = asked or self._start.carry_state
        result = self._service.embed_sentence(sentence, self._start.options, self._model)
        response = pb.EmbedStreamResponse(id=item.id, usage=pb.Usage(model_version=self._model.version))
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
    with_layers, shape = options.layers == pb.LAYERS_ALL, embedding.tensor.shape
    return shape[-2] if len(shape) == 2 + with_layers else 1


def _checked_choice(
    model: FakeModel,
    sentence: pb.Sentence,
    options: pb.EmbedOptions,
    n_tokens: int,
    bounds: Sequence[tuple[int, int]],
) -> FakeChoice | None:
    choice = choice_of(sentence, n_tokens, bounds) if Feature.SELECTION in model.features else None
    if choice is not None and not (choice.possible and (options.pooling != pb.POOLING_NONE or not choice.spans)):
        raise SentenceFailure(Reason.SELECTION_INVALID, "rows or spans: none, empty, out of range or not pooled")
    return choice


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


def _reduced(layers: FloatArray, options: pb.EmbedOptions, choice: FakeChoice | None) -> FloatArray:
    """(L, T, D) to what the options ask for."""
    match options.layers:
        case pb.LAYERS_TOP:
            layers = layers[-1]
        case pb.LAYERS_AVERAGE:
            layers = layers.mean(0)
        case pb.LAYERS_MIX:
            layers = _mixed(layers, options.mix)
    parts = [layers] if choice is None else [layers[..., rows, :] for rows in choice.parts]
    match options.pooling:
        case pb.POOLING_MEAN:
            parts = [part.mean(-2) for part in parts]
        case pb.POOLING_MAX:
            parts = [part.max(-2) for part in parts]
    layers = np.stack(parts, axis=-2) if choice is not None and choice.spans else parts[0]
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
