"""What a caller chooses of a model, and the model that is loaded from it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bilm_model.config import BilmConfig
from bilm_model.device import resolve_device
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.state import LstmStateCodec
from bilm_model.engine.types import Engine
from bilm_model.kernels.kernel_cache import CachedKernels, keep_triton_kernels
from bilm_model.kernels.product_paths import Precision, resolve_precision
from bilm_model.tokenization.tokenizers import deferred_tokenizer
from bilm_model.tokenization.types import Tokenizer
from bilm_model.weights.loading import load

_PRECISIONS = (*get_args(Precision), "auto")
_TOKENIZERS = ("moses", "whitespace")


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """Which model computes, and how; see `LocalEmbedder` for what the attributes mean.

    Raises:
        ValueError: A setting has a value that can't be; the message names it.
    """

    path: str
    options: Path | None
    device: str
    precision: str
    tokenizer: str
    tokenizer_language: str

    def __post_init__(self) -> None:
        for name, allowed in (("precision", _PRECISIONS), ("tokenizer", _TOKENIZERS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@dataclass(frozen=True, eq=False)
class LocalModel:
    """A loaded model.

    Attributes:
        name: Of its file or folder.
        version: A hash of weights and options.
        config: Its structure.
        parameter_count: Its size.
        precision: Of its products.
        engine: Computes; belongs to one thread.
        tokenizer: For raw text; any thread may use it.
        on_gpu: Whether it can't be used in a forked process.
    """

    name: str
    version: str
    config: BilmConfig
    parameter_count: int
    precision: str
    engine: Engine[Any]
    tokenizer: Tokenizer
    on_gpu: bool


def load_local(settings: LocalSettings) -> LocalModel:
    """Load a model in the thread that will compute with it, so that OpenMP keeps one team of workers only.

    torch's number of threads stays as the process has it.

    Raises:
        ModelError: The model, its device or the tokenizer's language can't be used; the message says why.
        PackageNotFoundError: The tokenizer needs a package that isn't installed.
    """
    tokenizer = deferred_tokenizer(settings.tokenizer, settings.tokenizer_language)
    device = resolve_device(settings.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        keep_triton_kernels(CachedKernels())
    precision = resolve_precision(settings.precision, device)
    loaded = load(settings.path, settings.options)
    bilm = loaded.bilm
    batch = CellularBatch(bilm, device, EngineOptions(precision=precision))
    return LocalModel(
        name=loaded.name,
        version=loaded.version,
        config=bilm.config,
        parameter_count=bilm.parameter_count,
        precision=precision,
        engine=RecurrentEngine(batch, LstmStateCodec(bilm.config, loaded.version)),
        tokenizer=tokenizer,
        on_gpu=on_gpu,
    )


def as_path(name: str, value: str | os.PathLike[str]) -> str:
    """Return a path as a str.

    Raises:
        TypeError: It is neither a str nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a str or a path, got {type(value).__name__}")
    return os.fspath(value)
