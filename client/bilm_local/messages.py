"""From results to the messages that a client reads."""

from collections.abc import Mapping, Sequence

import grpc
from bilm_api.constants import Feature, Reason
from bilm_api.v1 import embed_pb2 as pb
from bilm_client.errors import error_status
from bilm_model.alphabet import MAX_TOKEN_BYTES
from bilm_model.engine.types import DataType, EngineResult
from google.rpc import status_pb2

from bilm_local.computing import LocalResult
from bilm_local.loading import LocalModel
from bilm_local.sentences import LocalSentence, RefusedSentenceError, max_tokens

_DATA_TYPES: Mapping[DataType, pb.DataType] = {
    "float32": pb.DATA_TYPE_FLOAT32, "float16": pb.DATA_TYPE_FLOAT16, "bfloat16": pb.DATA_TYPE_BFLOAT16,
}  # fmt: skip
_MIB = 2**20

LIMITS = pb.Limits(
    max_sentences_per_request=4096,
    max_tokens_per_request=65_536,
    max_request_bytes=64 * _MIB,
    max_response_bytes=64 * _MIB,
    max_stream_items_in_flight=1024,
)
"""By which the client cuts a call: what keeps the engine busy, and no more, as several parts are in memory at once."""


def embed_response(model: LocalModel, results: Sequence[LocalResult], *, omit_tokens: bool) -> pb.EmbedResponse:
    """Return the response to an Embed."""
    response = pb.EmbedResponse()
    response.usage.model_version = model.version
    for result in results:
        message = response.results.add()
        if isinstance(result, RefusedSentenceError):
            message.error.CopyFrom(_status_of(result))
            continue
        response.usage.tokens += len(result.sentence.tokens)
        _fill(message.embedding, model, result, omit_tokens=omit_tokens, with_state=result.sentence.return_state)
    return response


def stream_response(
    model: LocalModel, item_id: int, result: LocalResult, *, omit_tokens: bool, with_state: bool
) -> pb.EmbedStreamResponse:
    """Return the response to an item of a stream, all rows in one message."""
    response = pb.EmbedStreamResponse(id=item_id)
    if isinstance(result, RefusedSentenceError):
        response.error.CopyFrom(_status_of(result))
        return response
    sentence = result.sentence
    response.usage.tokens, response.usage.model_version = len(sentence.tokens), model.version
    has_rows = not sentence.output.pooled or (sentence.choice is not None and sentence.choice.span_lengths is not None)
    rows = response.rows
    rows.total_rows, rows.last = result.vectors.shape[-2] if has_rows else 1, True
    _fill(rows.embedding, model, result, omit_tokens=omit_tokens, with_state=with_state)
    return response


def description(model: LocalModel) -> pb.GetModelResponse:
    """Return what the model is."""
    codec = model.engine.state_codec
    limits = pb.Limits(max_tokens_per_sentence=max_tokens(model))
    limits.MergeFrom(LIMITS)
    return pb.GetModelResponse(
        name=model.name,
        version=model.version,
        layer_count=model.config.layer_count,
        width=model.config.width,
        cell_size=model.config.cell_dim,
        parameter_count=model.parameter_count,
        precision=model.precision,
        backend=model.engine.description.backend,
        tokenizer=model.tokenizer.name,
        max_token_bytes=MAX_TOKEN_BYTES,
        state_bytes=0 if codec is None else codec.n_bytes,
        limits=limits,
        server_version="in process",
        inputs="char_cnn",
        contexts="lstm",
        features=Feature,
    )


def _fill(
    message: pb.Embedding,
    model: LocalModel,
    result: EngineResult[LocalSentence],
    *,
    omit_tokens: bool,
    with_state: bool,
) -> None:
    sentence, codec = result.sentence, model.engine.state_codec
    if not omit_tokens:
        message.tokens.extend(sentence.of_rows(sentence.tokens))
    if sentence.starts:
        message.token_starts.extend(sentence.of_rows(sentence.starts))
        message.token_ends.extend(sentence.of_rows(sentence.ends))
    message.truncated = sentence.truncated
    message.tensor.data = result.vectors.tobytes()
    message.tensor.shape.extend(result.vectors.shape)
    message.tensor.data_type = _DATA_TYPES[sentence.output.data_type]
    if with_state and codec is not None and result.state is not None:
        message.state = codec.encode(result.state)


def _status_of(refusal: RefusedSentenceError) -> status_pb2.Status:
    internal = refusal.reason is Reason.INTERNAL
    code = grpc.StatusCode.INTERNAL if internal else grpc.StatusCode.INVALID_ARGUMENT
    return error_status(refusal.reason, str(refusal), code.value[0])
