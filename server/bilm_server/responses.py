"""From results to the wire."""

from collections.abc import Iterable, Iterator

from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import DataType, State
from google.protobuf.duration_pb2 import Duration

from bilm_server.jobs import Outcome
from bilm_server.requests import PreparedSentence, Wanted
from bilm_server.served_model import ServedModel

STREAM_MESSAGE_BYTES = 2**20
"""Size of the vectors in one message of a stream; serialising one must not hold the event loop."""

_WIRE_TYPES: dict[DataType, embed_pb2.DataType] = {
    "float32": embed_pb2.DATA_TYPE_FLOAT32,
    "float16": embed_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": embed_pb2.DATA_TYPE_BFLOAT16,
}


def embedding(sentence: PreparedSentence, outcome: Outcome, wanted: Wanted, model: ServedModel) -> embed_pb2.Embedding:
    """The whole embedding of a sentence."""
    return _embedding_rows(sentence, outcome, wanted, model, slice(0, None), last=True)


def stream_rows(
    sentence: PreparedSentence, outcome: Outcome, wanted: Wanted, model: ServedModel
) -> Iterator[embed_pb2.EmbeddingRows]:
    """A sentence's embedding, in row ranges that fit a message."""
    total = 1 if wanted.pooled else len(sentence.tokens)
    step = total if wanted.pooled else max(1, STREAM_MESSAGE_BYTES // wanted.row_bytes(model))
    for first in range(0, max(total, 1), max(step, 1)):
        last = first + step >= total
        rows = slice(0, None) if wanted.pooled else slice(first, first + step)
        part = _embedding_rows(sentence, outcome, wanted, model, rows, last=last)
        yield embed_pb2.EmbeddingRows(embedding=part, first_row=first, total_rows=total, last=last)


def usage(outcomes: Iterable[tuple[PreparedSentence, Outcome]], model: ServedModel) -> embed_pb2.Usage:
    """What these sentences cost."""
    found = list(outcomes)
    return embed_pb2.Usage(
        queue_time=_duration(max((outcome.queue_s for _, outcome in found), default=0.0)),
        inference_time=_duration(max((outcome.inference_s for _, outcome in found), default=0.0)),
        tokens=sum(len(sentence.tokens) for sentence, _ in found),
        model_version=model.version,
    )


def _embedding_rows(
    sentence: PreparedSentence, outcome: Outcome, wanted: Wanted, model: ServedModel, rows: slice, *, last: bool
) -> embed_pb2.Embedding:
    vectors = outcome.vectors if wanted.pooled else outcome.vectors[..., rows, :]
    state = outcome.state if last and sentence.return_state else None
    return embed_pb2.Embedding(
        tokens=() if wanted.omit_tokens else sentence.tokens[rows],
        token_starts=sentence.starts[rows],
        token_ends=sentence.ends[rows],
        truncated=sentence.truncated,
        tensor=embed_pb2.Tensor(data=vectors.tobytes(), shape=vectors.shape, data_type=_WIRE_TYPES[wanted.data_type]),
        state=b"" if state is None else _encoded(state, model),
    )


def _encoded(state: State, model: ServedModel) -> bytes:
    codec = model.engine.state_codec
    return b"" if codec is None else codec.encode(state)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
