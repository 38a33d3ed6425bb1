"""From results to messages of `bilm_api.v1`; a vector that is alone in its embedding is copied once, into the response.

An `Embed` of many sentences asks for one vector of each, mostly. A message for each costs several times what the bytes
around its vector do, and those are the same for all vectors of a shape.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import DataType
from google.protobuf import duration_pb2

from bilm_server.embedding.preprocessing import row_bytes
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Outcome, Result, Sentence
from bilm_server.protocols.grpc.status import status_of
from bilm_server.served_model import EmbeddingModel

Buffer = bytes | memoryview

STREAM_MESSAGE_BYTES = 2**20
"""Size of the vectors in one message of a stream; serialising one must not hold the event loop."""

_DATA_TYPES: Mapping[DataType, embed_pb2.DataType] = {
    "float32": embed_pb2.DATA_TYPE_FLOAT32,
    "float16": embed_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": embed_pb2.DATA_TYPE_BFLOAT16,
}

# Generous bounds of what protobuf adds: a sentence's tags, lengths and shape; a token's tag, length and two offsets.
_SENTENCE_OVERHEAD_BYTES, _TOKEN_OVERHEAD_BYTES = 128, 16


@dataclass(frozen=True)
class WireFormat:
    """How results become messages.

    Attributes:
        model: that computes them.
        omit_tokens: whether the client knows the tokens.
    """

    model: EmbeddingModel
    omit_tokens: bool

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return an upper bound of what a sentence takes of a message beside its vectors and state."""
        tokens = sentence.of_rows(sentence.tokens)
        text = 0 if self.omit_tokens else sum(4 * len(token) for token in tokens)
        return text + _SENTENCE_OVERHEAD_BYTES + _TOKEN_OVERHEAD_BYTES * len(tokens)

    def build(self, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> bytes:
        """Return the response to an `Embed`, serialised: the messages of its parts, one behind the other, are one."""
        parts: list[Buffer] = []
        computed: list[tuple[Sentence, Result]] = []
        for sentence, result in zip(sentences, results, strict=True):
            if isinstance(result, RefusalError):
                refused = embed_pb2.EmbedResult(error=status_of(result))
                parts.append(embed_pb2.EmbedResponse(results=[refused]).SerializeToString())
                continue
            computed.append((sentence, result))
            if self._has_vector_alone(sentence):
                vector = result.vectors
                before, behind = _around(vector.nbytes, vector.shape, sentence.output.data_type)
                parts += before, np.ascontiguousarray(vector).data, behind
            else:
                parts.append(self._serialised(sentence, result))
        end = embed_pb2.EmbedResponse()
        self._fill_usage(end.usage, computed)
        parts.append(end.SerializeToString())
        return b"".join(parts)

    def rows(
        self, item_id: int, sentence: Sentence, result: Result, *, with_state: bool
    ) -> Iterator[embed_pb2.EmbedStreamResponse]:
        """Yield a sentence's embedding in row ranges that fit a message; the last one has the state and the usage."""
        count = sentence.row_count
        total = 1 if count is None else count
        step = max(1, STREAM_MESSAGE_BYTES // row_bytes(sentence.output, self.model))
        for first in range(0, max(total, 1), step):
            message = embed_pb2.EmbedStreamResponse(id=item_id)
            rows = message.rows
            rows.first_row, rows.total_rows, rows.last = first, total, first + step >= total
            self._fill(rows.embedding, sentence, result, slice(first, first + step))
            if rows.last:
                if with_state:
                    rows.embedding.state = self._state_bytes(result)
                self._fill_usage(message.usage, [(sentence, result)])
            yield message

    def _has_vector_alone(self, sentence: Sentence) -> bool:
        """Return whether the embedding has neither tokens, offsets, marks nor a state, and one of few shapes."""
        return (
            self.omit_tokens
            and sentence.output.selection.pooling != "none"
            and not (sentence.starts or sentence.truncated or sentence.return_state)
            and sentence.row_count is None
        )

    def _serialised(self, sentence: Sentence, result: Result) -> bytes:
        response = embed_pb2.EmbedResponse()
        embedding = response.results.add().embedding
        self._fill(embedding, sentence, result, slice(0, None))
        if sentence.return_state:
            embedding.state = self._state_bytes(result)
        data: bytes = response.SerializeToString()
        return data

    def _fill(self, message: embed_pb2.Embedding, sentence: Sentence, result: Result, rows: slice) -> None:
        vectors = result.vectors if sentence.row_count is None else result.vectors[..., rows, :]
        if not self.omit_tokens:
            message.tokens.extend(sentence.of_rows(sentence.tokens, rows))
        if sentence.starts:
            message.token_starts.extend(sentence.of_rows(sentence.starts, rows))
            message.token_ends.extend(sentence.of_rows(sentence.ends, rows))
        if sentence.truncated:
            message.truncated = True
        _fill_tensor(message.tensor, vectors.tobytes(), vectors.shape, sentence.output.data_type)

    def _state_bytes(self, result: Result) -> bytes:
        codec = self.model.state_codec
        return b"" if codec is None or result.state is None else codec.encode(result.state)

    def _fill_usage(self, usage: embed_pb2.Usage, computed: Sequence[tuple[Sentence, Result]]) -> None:
        _set_duration(usage.queue_time, max([result.queue_s for _, result in computed], default=0.0))
        _set_duration(usage.inference_time, max([result.inference_s for _, result in computed], default=0.0))
        usage.tokens = sum([len(sentence.tokens) for sentence, _ in computed])
        usage.model_version = self.model.version


@lru_cache(maxsize=256)
def _around(n_bytes: int, shape: tuple[int, ...], data_type: DataType) -> tuple[bytes, bytes]:
    """Return the bytes before and behind the values of an embedding that has nothing else, in a response."""
    values = b"\xff" * n_bytes  # such a byte is neither a tag nor the last one of a length, so nothing before is taken
    response = embed_pb2.EmbedResponse()
    _fill_tensor(response.results.add().embedding.tensor, values, shape, data_type)
    before, _, behind = response.SerializeToString().partition(values)
    return before, behind


def _fill_tensor(tensor: embed_pb2.Tensor, values: bytes, shape: Sequence[int], data_type: DataType) -> None:
    tensor.data = values
    tensor.shape.extend(shape)
    tensor.data_type = _DATA_TYPES[data_type]


def _set_duration(duration: duration_pb2.Duration, seconds: float) -> None:
    """Set a duration, 0 included, which is sent."""
    duration.seconds, duration.nanos = divmod(int(seconds * 1e9), 10**9)
