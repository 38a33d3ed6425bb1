"""The header of our own weight file: read and checked without the library, which loads torch.

Source: the format of safetensors: eight bytes with the header's length, little-endian; the header, JSON, by tensor its
dtype, shape and place behind the header, and `__metadata__`, strings by name; then the tensors' bytes without a gap.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bilm_system.files import reason

from bilm_model.config import BilmConfig
from bilm_model.errors import ConfigError, WeightsError
from bilm_model.weights.options import parse_options
from bilm_model.weights.shapes import Shapes, parameter_shapes

FORMAT = "bilm-serve/1"
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_OURS = ("F32", "F16")

# The library takes 100 MB and makes ten times as much of them; the model that ships has 4 KB
_MAX_HEADER_BYTES = 2**20
_LENGTH_BYTES = 8
_MAX_SIZE = 2**63


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header has it.

    Attributes:
        dtype: in the format's words, as "F32".
        shape: its axes.
        begin: of its bytes, behind the header.
        end: of its bytes, behind the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FileHeader:
    """The header of a file.

    Attributes:
        metadata: strings by name.
        tensors: by name.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_config(path: Path) -> BilmConfig:
    """Read the structure alone, and check that the file has tensors of its shapes.

    Raises:
        WeightsError: as `single_file.read` does, except for what the tensors hold.
    """
    header = read_header(path)
    config, _ = read_metadata(path, header.metadata)
    check_tensors(path, header.tensors, parameter_shapes(config))
    return config


def read_header(path: Path) -> FileHeader:
    """Read the header of a file.

    Raises:
        WeightsError: if the file can't be read, or the header is none or doesn't fit the file.
    """
    try:
        with path.open("rb") as file:
            n_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if n_bytes > _MAX_HEADER_BYTES:
                raise _DamageError(f"a header of {n_bytes} bytes, more than {_MAX_HEADER_BYTES}")
            data = file.read(n_bytes)
            behind = file.seek(0, 2) - _LENGTH_BYTES - n_bytes
    except OSError as error:
        raise WeightsError(f"{path}: {reason(error)}") from error
    except _DamageError as error:
        raise _unreadable(path, error) from error
    try:
        return _parse(data, n_bytes, behind)
    except (_DamageError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def read_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[BilmConfig, str]:
    """Return the structure and the version that a file's metadata names.

    Raises:
        WeightsError: if they are missing, or the file isn't ours.
    """
    for key in ("format", "options", "version"):
        if key not in metadata:
            raise WeightsError(f"{path}: metadata {key}: missing; was this file written by bilm-convert?")
    if metadata["format"] != FORMAT:
        raise WeightsError(f"{path}: metadata format: expected {FORMAT}, found {metadata['format']}")
    try:
        return parse_options(metadata["options"]), metadata["version"]
    except ConfigError as error:
        raise WeightsError(f"{path}: metadata options: {error}") from error


def check_tensors(path: Path, found: Mapping[str, StoredTensor], shapes: Shapes) -> None:
    """Check that a file has the tensors of these shapes, and no other.

    Raises:
        WeightsError: naming the first one that isn't as it should be.
    """
    for name in sorted(found.keys() - shapes.keys()):
        raise WeightsError(f"{path}: {name}: not part of the model that the options describe")
    for name, shape in shapes.items():
        if name not in found:
            raise WeightsError(f"{path}: {name}: missing, expected shape {shape}")
        stored = found[name]
        if stored.shape != shape:
            raise WeightsError(f"{path}: {name}: expected shape {shape}, found {stored.shape}")
        if stored.dtype not in _OURS:
            raise WeightsError(f"{path}: {name}: expected float32 or float16, found {stored.dtype}")


class _DamageError(Exception):
    """The header isn't what it should be; the message says how."""


def _unreadable(path: Path, why: object) -> WeightsError:
    return WeightsError(f"{path}: not a readable safetensors file: {why}")


def _parse(data: bytes, n_bytes: int, behind: int) -> FileHeader:
    if len(data) < n_bytes or not data:
        raise _DamageError(f"a header of {n_bytes} bytes, and {len(data)} in the file")
    content = json.loads(data.decode("utf-8"))
    if not isinstance(content, dict):
        raise _DamageError("the header is no JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _DamageError("__metadata__: expected strings by name")
    tensors = {name: _tensor(name, entry) for name, entry in content.items()}
    _check_places(tensors, behind)
    return FileHeader(metadata, tensors)


def _tensor(name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _DamageError(f"{name}: expected dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_size, (*shape, begin, end))):
        raise _DamageError(f"{name}: expected a dtype and sizes")
    if dtype not in _ITEM_BYTES:
        raise _DamageError(f"{name}: unknown dtype {dtype!r}")
    if end - begin != (expected := prod(shape) * _ITEM_BYTES[dtype]):
        raise _DamageError(f"{name}: {end - begin} bytes, expected {expected} by dtype and shape")
    return StoredTensor(dtype, tuple(shape), begin, end)


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _MAX_SIZE


def _check_places(tensors: Mapping[str, StoredTensor], behind: int) -> None:
    """Check that the tensors lie one behind another, and fill the file."""
    place = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != place:
            raise _DamageError(f"{name}: bytes {tensor.begin} to {tensor.end}, expected them to begin at {place}")
        place = tensor.end
    if place != behind:
        raise _DamageError(f"the tensors have {place} bytes, and {behind} lie behind the header")
