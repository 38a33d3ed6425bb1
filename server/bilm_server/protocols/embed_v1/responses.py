"""From results to messages of `bilm_api.v1`, which are filled in place: a vector is copied once into its message."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import DataType
from google.protobuf import duration_pb2

from bilm_server.embedding.preprocessing import row_bytes
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Outcome, Result, Sentence
from bilm_server.protocols.grpc.status import status_of
from bilm_server.served_model import ServedModel

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

    model: ServedModel
    omit_tokens: bool

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return an upper bound of what a sentence takes of a message beside its vectors and state."""
        text = 0 if self.omit_tokens else sum(4 * len(token) for token in sentence.tokens)
        return text + _SENTENCE_OVERHEAD_BYTES + _TOKEN_OVERHEAD_BYTES * len(sentence.tokens)

    def build(self, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> bytes:
        """Return the response to an `Embed`, serialised: that may take as long as all else here."""
        response, computed = embed_pb2.EmbedResponse(), []
        for sentence, result in zip(sentences, results, strict=True):
            found = response.results.add()
            if isinstance(result, RefusalError):
                found.error.CopyFrom(status_of(result))
                continue
            computed.append((sentence, result))
            embedding = found.embedding
            self._fill(embedding, sentence, result, slice(0, None))
            if sentence.return_state:
                embedding.state = self._state_bytes(result)
        self._fill_usage(response.usage, computed)
        data: bytes = response.SerializeToString()
        return data

    def rows(
        self, item_id: int, sentence: Sentence, result: Result, *, with_state: bool
    ) -> Iterator[embed_pb2.EmbedStreamResponse]:
        """Yield a sentence's embedding in row ranges that fit a message; the last one has the state and the usage."""
        pooled = sentence.output.pooled
        total = 1 if pooled else len(sentence.tokens)
        step = 1 if pooled else max(1, STREAM_MESSAGE_BYTES // row_bytes(sentence.output, self.model))
        for first in range(0, max(total, 1), step):
            message = embed_pb2.EmbedStreamResponse(id=item_id)
            rows = message.rows
            rows.first_row, rows.total_rows, rows.last = first, total, first + step >= total
            self._fill(rows.embedding, sentence, result, slice(0, None) if pooled else slice(first, first + step))
            if rows.last:
                if with_state:
                    rows.embedding.state = self._state_bytes(result)
                self._fill_usage(message.usage, [(sentence, result)])
            yield message

    def _fill(self, message: embed_pb2.Embedding, sentence: Sentence, result: Result, rows: slice) -> None:
        vectors = result.vectors if sentence.output.pooled else result.vectors[..., rows, :]
        if not self.omit_tokens:
            message.tokens.extend(sentence.tokens[rows])
        if sentence.starts:
            message.token_starts.extend(sentence.starts[rows])
            message.token_ends.extend(sentence.ends[rows])
        if sentence.truncated:
            message.truncated = True
        tensor = message.tensor
        tensor.data = vectors.tobytes()
        tensor.shape.extend(vectors.shape)
        tensor.data_type = _DATA_TYPES[sentence.output.data_type]

    def _state_bytes(self, result: Result) -> bytes:
        codec = self.model.engine.state_codec
        return b"" if codec is None or result.state is None else codec.encode(result.state)

    def _fill_usage(self, usage: embed_pb2.Usage, computed: Sequence[tuple[Sentence, Result]]) -> None:
        queue_s, inference_s, n_tokens = 0.0, 0.0, 0
        for sentence, result in computed:
            queue_s, inference_s = max(queue_s, result.queue_s), max(inference_s, result.inference_s)
            n_tokens += len(sentence.tokens)
        _set_duration(usage.queue_time, queue_s)
        _set_duration(usage.inference_time, inference_s)
        usage.tokens = n_tokens
        usage.model_version = self.model.version


def _set_duration(duration: duration_pb2.Duration, seconds: float) -> None:
    """Set a duration, 0 included, which is sent."""
    duration.seconds, duration.nanos = divmod(int(seconds * 1e9), 10**9)
