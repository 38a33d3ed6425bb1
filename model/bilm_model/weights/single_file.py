"""Our own weight file: one safetensors file with everything a server needs.

Tensors are named as the parameters of `Bilm`, all float32 or all float16. The metadata holds `format`, `options` (the
published options as JSON) and `version` (see `content_version`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from bilm_system.files import reason
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bilm_model.bilm import Bilm
from bilm_model.config import BilmConfig, to_options
from bilm_model.errors import ConfigError, WeightsError
from bilm_model.weights.options import parse_options
from bilm_model.weights.version import content_version

FORMAT = "bilm-serve/1"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_STORED_DTYPES = ("F32", "F16")

# The library takes 100 MB and makes ten times as much of them; the model that ships has 4 KB
_MAX_HEADER_BYTES = 2**20


def read(path: Path) -> tuple[BilmConfig, dict[str, Tensor], str]:
    """Read a file.

    Returns:
        The structure, float32 tensors by our parameters' names, and the version.

    Raises:
        WeightsError: if the file can't be read, isn't ours, has a tensor too many or too few or of the wrong shape or
            format, or its content doesn't hash to the version it names.
    """
    with _opened(path) as file:
        config, version = _read_metadata(path, file.metadata() or {})
        tensors = _read_tensors(path, file, Bilm.parameter_shapes(config))
    found = content_version(config, tensors)
    if found != version:
        raise WeightsError(f"{path}: version: expected {version} (metadata), found {found} (content): damaged")
    return config, tensors, version


def read_config(path: Path) -> BilmConfig:
    """Read the structure alone, and check that the file has tensors of its shapes.

    Raises:
        WeightsError: as `read` does, except for what the tensors hold.
    """
    with _opened(path) as file:
        config, _ = _read_metadata(path, file.metadata() or {})
        _check_tensors(path, file, Bilm.parameter_shapes(config))
    return config


def write(path: Path, config: BilmConfig, tensors: Mapping[str, Tensor], dtype: str = "float32") -> str:
    """Write float32 tensors, rounded to `dtype` ("float32" or "float16"); return the version of what was written.

    Raises:
        WeightsError: if a value is too large for the format.
    """
    stored = {name: tensor.to(_DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{name}: holds values that {dtype} can't hold")
    version = content_version(config, stored)
    metadata = {"format": FORMAT, "options": json.dumps(to_options(config)), "version": version}
    # not `save_file`, which leaves a file that only its owner may read
    path.write_bytes(save(stored, metadata=metadata))
    return version


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    _check_header_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, ValueError, SafetensorError) as error:  # a ValueError for an empty file
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error


def _check_header_size(path: Path) -> None:
    try:
        with path.open("rb") as file:
            n_bytes = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise WeightsError(f"{path}: {reason(error)}") from error
    if n_bytes > _MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path}: not a readable safetensors file: a header of {n_bytes} bytes, more than {_MAX_HEADER_BYTES}"
        )


def _read_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[BilmConfig, str]:
    for key in ("format", "options", "version"):
        if key not in metadata:
            raise WeightsError(f"{path}: metadata {key}: missing; was this file written by bilm-convert?")
    if metadata["format"] != FORMAT:
        raise WeightsError(f"{path}: metadata format: expected {FORMAT}, found {metadata['format']}")
    try:
        return parse_options(metadata["options"]), metadata["version"]
    except ConfigError as error:
        raise WeightsError(f"{path}: metadata options: {error}") from error


def _check_tensors(path: Path, file: safe_open, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = set(file.keys())
    for name in sorted(found - shapes.keys()):
        raise WeightsError(f"{path}: {name}: not part of the model that the options describe")
    for name, shape in shapes.items():
        if name not in found:
            raise WeightsError(f"{path}: {name}: missing, expected shape {shape}")
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise WeightsError(f"{path}: {name}: expected shape {shape}, found {tuple(stored.get_shape())}")
        if stored.get_dtype() not in _STORED_DTYPES:
            raise WeightsError(f"{path}: {name}: expected float32 or float16, found {stored.get_dtype()}")


def _read_tensors(path: Path, file: safe_open, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    _check_tensors(path, file, shapes)
    tensors = {}
    for name in shapes:
        tensor = file.get_tensor(name)
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: {name}: holds values that are not finite numbers")
        # Copied: what safe_open gives is the file itself, and would change with it under a running server
        tensors[name] = tensor.to(torch.float32, copy=True)
    return tensors
