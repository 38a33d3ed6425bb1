"""Vectors as JSON values: nested lists of numbers, or base64 of their little-endian bytes."""

from binascii import b2a_base64
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import orjson
from bilm_model.engine.types import DataType
from numpy.typing import NDArray

Encoding = Literal["float", "base64"]
ENCODINGS: Final[Mapping[str, Encoding]] = {"float": "float", "base64": "base64"}

FLOAT_CHARACTERS: Final = 16
"""Of the longest float32 in JSON, its comma included."""
_BRACKETS_BYTES = 4  # of a row, its comma included, and a share of those around it
_BLOCK_VALUES = 2**13  # written at a time, 1 ms: orjson keeps Python's lock


def extra_bytes(encoding: Encoding, n_bytes: int, item_bytes: int, n_rows: int) -> int:
    """Return an upper bound of what vectors take in JSON beyond their own bytes."""
    if encoding == "base64":
        return base64_bytes(n_bytes) - n_bytes
    return n_bytes // item_bytes * FLOAT_CHARACTERS + n_rows * _BRACKETS_BYTES + _BRACKETS_BYTES - n_bytes


def base64_bytes(n_bytes: int) -> int:
    """Return the length of so many bytes in base64."""
    return -(-n_bytes // 3) * 4


def to_json(vectors: NDArray[Any], data_type: DataType, encoding: Encoding) -> bytes:
    """Return vectors as a JSON value.

    Args:
        vectors: [L] [T] D, as an engine returns them: bfloat16 as the integers that have its bits.
        data_type: of them.
        encoding: of the value; numbers are the shortest that read back as the same float32, into which float16 and
            bfloat16 go without a loss.
    """
    if encoding == "base64":
        return b'"%b"' % text_of(np.ascontiguousarray(vectors).tobytes())
    return _numbers(_as_float32(vectors, data_type))


def text_of(data: bytes) -> bytes:
    """Return bytes in base64."""
    return b2a_base64(data, newline=False)


def _as_float32(vectors: NDArray[Any], data_type: DataType) -> NDArray[np.float32]:
    if data_type == "bfloat16":
        return (vectors.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _numbers(vectors: NDArray[np.float32]) -> bytes:
    if vectors.ndim > 1 and vectors.size > _BLOCK_VALUES:
        return b"[%b]" % b",".join(map(_numbers, vectors))
    return orjson.dumps(np.ascontiguousarray(vectors), option=orjson.OPT_SERIALIZE_NUMPY)
