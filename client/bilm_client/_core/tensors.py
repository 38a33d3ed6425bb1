"""Messages to value objects: tensors, embeddings, and results that come in ranges of rows.

Shapes: L layers, T tokens that come back, or spans, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.inputs import Input
from bilm_client._core.options import Options
from bilm_client.errors import MalformedResponseError
from bilm_client.results import Embedding, Vectors

_NUMPY: dict[pb.DataType, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
}


def to_array(tensor: pb.Tensor, options: Options, *, spans: bool = False) -> Vectors:
    """Return the numbers of a tensor, as a read-only view where numpy knows the format; bfloat16 widened to float32.

    Raises:
        MalformedResponseError: Format, number of axes or number of bytes aren't as asked for and announced.
    """
    shape, axes = tuple(tensor.shape), options.axes + spans
    if tensor.data_type != options.data_type or len(shape) != axes:
        raise MalformedResponseError(
            f"expected a tensor of {options.dtype} with {axes} axes, got data type {tensor.data_type}, {shape}"
        )
    data, dtype = tensor.data, _NUMPY[tensor.data_type]
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise MalformedResponseError(f"expected {math.prod(shape)} numbers for shape {shape}, got {len(data)} bytes")
    array: Vectors = np.frombuffer(data, dtype).reshape(shape)
    if options.dtype != "bfloat16":
        return array
    widened: Vectors = (array.astype("<u4") << 16).view("<f4")
    widened.flags.writeable = False
    return widened


def to_embedding(message: pb.Embedding, source: Input, options: Options, model_version: str) -> Embedding:
    """Return the embedding of a whole sentence, read from the message in place.

    Raises:
        MalformedResponseError: The message isn't what was asked for.
    """
    vectors, found = to_array(message.tensor, options, spans=source.has_spans), tuple(_offsets(message))
    tokens, offsets = source.tokens_expected(options), None
    if tokens is None:
        tokens, offsets = tuple(message.tokens), found
    _check_counts(source, options, _row_count(message, source, options), tokens, offsets)
    return Embedding(tokens, vectors, message.truncated, offsets, message.state or None, model_version)


@dataclass(slots=True)
class Rows:
    """Collects the row ranges of one sentence, in order."""

    source: Input
    options: Options
    _vectors: Vectors | None = None
    _row_count: int = 0
    _tokens: list[str] = field(default_factory=list)
    _offsets: list[tuple[int, int]] = field(default_factory=list)
    _truncated: bool = False
    _state: bytes = b""

    def add(self, message: pb.EmbeddingRows) -> bool:
        """Take a range; True if it was the last.

        Raises:
            MalformedResponseError: The range doesn't continue where the one before it ended, or has another shape.
        """
        embedding = message.embedding
        rows = _row_count(embedding, self.source, self.options)
        end = self._row_count + rows
        # An empty range is legal for a sentence without tokens only: it would be no progress anywhere else.
        if (
            message.first_row != self._row_count
            or (end == message.total_rows) != message.last
            or (rows == 0 and message.total_rows > 0)
        ):
            raise MalformedResponseError(
                f"expected rows from {self._row_count} of {message.total_rows}, got {rows} from "
                f"{message.first_row}, last={message.last}"
            )
        self._store(to_array(embedding.tensor, self.options, spans=self.source.has_spans), message)
        self._row_count = end
        self._tokens += embedding.tokens
        self._offsets += _offsets(embedding)
        self._truncated |= embedding.truncated
        self._state = embedding.state
        return message.last

    def embedding(self, model_version: str) -> Embedding:
        """Return the whole sentence's embedding, after the last range.

        Raises:
            MalformedResponseError: Vectors, tokens and offsets differ in number.
        """
        if self._vectors is None:
            raise MalformedResponseError("a result without rows")
        self._vectors.flags.writeable = False
        tokens, offsets = self.source.tokens_expected(self.options), None
        if tokens is None:
            tokens, offsets = tuple(self._tokens), tuple(self._offsets)
        _check_counts(self.source, self.options, self._row_count, tokens, offsets)
        return Embedding(tokens, self._vectors, self._truncated, offsets, self._state or None, model_version)

    def _store(self, part: Vectors, message: pb.EmbeddingRows) -> None:
        if self._vectors is None and message.last:
            self._vectors = part  # the common case: no copy
            return
        axis = self.options.token_axis
        if self._vectors is None:
            shape = list(part.shape)
            shape[axis] = message.total_rows
            self._vectors = np.empty(shape, part.dtype)
        end = self._row_count + part.shape[axis]
        place = (slice(None),) * axis + (slice(self._row_count, end),)
        if self._vectors[place].shape != part.shape:
            raise MalformedResponseError(f"rows of shape {part.shape} don't fit a result of {self._vectors.shape}")
        self._vectors[place] = part


def _check_counts(
    source: Input, options: Options, row_count: int, tokens: Sequence[str], offsets: Sequence[tuple[int, int]] | None
) -> None:
    chosen = source.rows_chosen(options)
    if chosen is not None and row_count != chosen:
        raise MalformedResponseError(f"expected {chosen} chosen rows, got {row_count}")
    if not options.pooled and len(tokens) != row_count:
        raise MalformedResponseError(f"expected {len(tokens)} rows, one for each token, got {row_count}")
    if offsets is not None and len(offsets) != len(tokens):
        raise MalformedResponseError(f"expected {len(tokens)} offsets, got {len(offsets)}")


def _row_count(message: pb.Embedding, source: Input, options: Options) -> int:
    if options.pooled and not source.has_spans:
        return 1
    shape, axes = message.tensor.shape, options.axes + source.has_spans
    if len(shape) != axes:
        raise MalformedResponseError(f"expected {axes} axes, got {tuple(shape)}")
    return shape[options.token_axis]


def _offsets(message: pb.Embedding) -> list[tuple[int, int]]:
    starts, ends = message.token_starts, message.token_ends
    if len(starts) != len(ends):
        raise MalformedResponseError("token_starts and token_ends differ in number")
    return list(zip(starts, ends, strict=True)) if starts else []
