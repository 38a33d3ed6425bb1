"""Our own weight file: one safetensors file with everything a server needs.

Tensors are named as the parameters of `Bilm`, all float32 or all float16. The metadata holds `format`, `options` (the
published options as JSON) and `version` (see `content_version`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bilm_model.config import BilmConfig, to_options
from bilm_model.errors import WeightsError
from bilm_model.weights.safetensors_header import FORMAT, check_tensors, read_header, read_metadata
from bilm_model.weights.shapes import parameter_shapes
from bilm_model.weights.version import content_version

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def read(path: Path) -> tuple[BilmConfig, dict[str, Tensor], str]:
    """Read a file.

    Returns:
        The structure, float32 tensors by our parameters' names, and the version.

    Raises:
        WeightsError: if the file can't be read, isn't ours, has a tensor too many or too few or of the wrong shape or
            format, or its content doesn't hash to the version it names.
    """
    header = read_header(path)
    config, version = read_metadata(path, header.metadata)
    shapes = parameter_shapes(config)
    check_tensors(path, header.tensors, shapes)
    with _opened(path) as file:
        tensors = _read_tensors(path, file, shapes)
    found = content_version(config, tensors)
    if found != version:
        raise WeightsError(f"{path}: version: expected {version} (metadata), found {found} (content): damaged")
    return config, tensors, version


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
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, ValueError, SafetensorError) as error:  # a ValueError for an empty file
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error


def _read_tensors(path: Path, file: safe_open, names: Iterable[str]) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        tensor = file.get_tensor(name)
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: {name}: holds values that are not finite numbers")
        # Copied: what safe_open gives is the file itself, and would change with it under a running server
        tensors[name] = tensor.to(torch.float32, copy=True)
    return tensors
