"""The model as the service sees it: loaded, on its device, with its tokenizer."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from bilm_model.config import BilmConfig
from bilm_model.device import default_threads, resolve_device
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.state import LstmStateCodec
from bilm_model.engine.types import Engine, StateCodec
from bilm_model.errors import ModelError
from bilm_model.kernels.fallbacks import fallback_counts
from bilm_model.kernels.kernel_cache import CachedKernels, keep_triton_kernels, use_store
from bilm_model.kernels.product_paths import Precision, ProductPath, resolve_precision
from bilm_model.tokenization.types import Tokenizer
from bilm_model.weights.header import ModelHeader
from bilm_model.weights.loading import load

from bilm_server.config import ServerConfig
from bilm_server.preflight import configured_tokenizer, served_name

MODEL_SETTINGS = (
    "model", "options", "precision", "tokenizer", "tokenizer_language", "token_cache_mib", "input_cache_mib"
)  # fmt: skip
"""Settings that can differ between the models of a server."""


class EmbeddingModel(Protocol):
    """What calls and clients see of a model, or of an ensemble of several."""

    @property
    def name(self) -> str:
        """That requests may give."""

    @property
    def version(self) -> str:
        """A hash of weights and options."""

    @property
    def layer_count(self) -> int:
        """Layers that "all" returns, the token layer included."""

    @property
    def width(self) -> int:
        """Components of a vector."""

    @property
    def cell_size(self) -> int:
        """Size of the LSTM cells; 0 where there are none, or of several kinds."""

    @property
    def parameter_count(self) -> int:
        """Its size."""

    @property
    def precision(self) -> str:
        """Of its products, "float32" or "bfloat16"."""

    @property
    def backend(self) -> str:
        """Device and implementation, for people to read."""

    @property
    def tokenizer(self) -> Tokenizer:
        """For raw text."""

    @property
    def inputs(self) -> str:
        """What makes vectors of tokens."""

    @property
    def contexts(self) -> str:
        """What runs over them."""

    @property
    def members(self) -> tuple[str, ...]:
        """Names of an ensemble's models; none for a model."""

    @property
    def state_codec(self) -> StateCodec | None:
        """For the states of its sentences; None: it has none."""

    @property
    def state_bytes(self) -> int:
        """Bytes of a state; 0 for a model without states."""


@dataclass(frozen=True)
class ServedModel:
    """One model and what belongs to it (`EmbeddingModel`).

    Attributes:
        name: that requests may give.
        version: a hash of weights and options.
        config: its structure.
        parameter_count: its size.
        precision: of its products, "float32" or "bfloat16".
        engine: runs it.
        tokenizer: for raw text.
    """

    name: str
    version: str
    config: BilmConfig
    parameter_count: int
    precision: str
    engine: Engine[Any]
    tokenizer: Tokenizer

    inputs = "char_cnn"
    contexts = "lstm"
    members: ClassVar[tuple[str, ...]] = ()

    @property
    def layer_count(self) -> int:
        """See `EmbeddingModel`."""
        return self.config.layer_count

    @property
    def width(self) -> int:
        """See `EmbeddingModel`."""
        return self.config.width

    @property
    def cell_size(self) -> int:
        """See `EmbeddingModel`."""
        return self.config.cell_dim

    @property
    def backend(self) -> str:
        """See `EmbeddingModel`."""
        return self.engine.description.backend

    @property
    def state_codec(self) -> StateCodec | None:
        """See `EmbeddingModel`."""
        return self.engine.state_codec

    @property
    def state_bytes(self) -> int:
        """See `EmbeddingModel`."""
        return 0 if self.state_codec is None else self.state_codec.n_bytes


def load_served_model(config: ServerConfig, bfloat16: ProductPath | None = None) -> ServedModel:
    """Load what the configuration names.

    In a thread that ends with it: OpenMP keeps a team of workers for each thread that has computed anything, and once
    there are more of them than cores, all of them sleep where they would spin. Measured on two cores: a sentence takes
    39 ms instead of 23 ms in a process whose main thread has loaded the model.

    Args:
        config: what to load.
        bfloat16: how a CPU computes bfloat16 products; None: the fastest way that works here.

    Raises:
        ModelError: if that can't be served, or a kernel that is required doesn't work.
        ConfigurationError: if its tokenizer doesn't know the language.
    """
    with ThreadPoolExecutor(1, "loading") as loading:
        return loading.submit(_load, config, bfloat16).result()


def _load(config: ServerConfig, bfloat16: ProductPath | None) -> ServedModel:
    kernels = CachedKernels(config.kernel_cache)
    use_store(kernels)
    torch.set_num_threads(config.threads or default_threads())
    device = resolve_device(config.device)
    if device.type == "cuda":
        keep_triton_kernels(kernels)
    precision = resolve_precision(config.precision, device, bfloat16)
    loaded = load(config.model, config.options)
    bilm = loaded.bilm
    batch = CellularBatch(bilm, device, engine_options(config, precision, bfloat16))
    engine: Engine[Any] = RecurrentEngine(batch, LstmStateCodec(bilm.config, loaded.version))
    if config.require_kernels and (parts := ", ".join(fallback_counts())):
        raise ModelError(f"require_kernels: {parts}: kernels don't work here; the errors above say why")
    return ServedModel(
        name=served_name(config, loaded.name),
        version=loaded.version,
        config=bilm.config,
        parameter_count=bilm.parameter_count,
        precision=precision,
        engine=engine,
        tokenizer=configured_tokenizer(config),
    )


def host_bytes(config: ServerConfig, header: ModelHeader, device: torch.device) -> int:
    """Return what a model takes of the host's memory once it is loaded: parameters, sentences in flight, caches."""
    options = engine_options(config).resolved(device)
    names = options.name_bytes(header.config)
    if device.type == "cuda":
        return names
    on_device = 4 * header.parameter_count + options.memory_bytes(header.config, device) + options.input_cache_bytes
    return names + on_device


def engine_options(
    config: ServerConfig, precision: Precision = "float32", bfloat16: ProductPath | None = None
) -> EngineOptions:
    """Return the engine's settings.

    Args:
        config: the server's.
        precision: in which its products are computed.
        bfloat16: how those in bfloat16 are.
    """
    return EngineOptions(
        precision=precision,
        products=bfloat16 if precision == "bfloat16" else None,
        max_rows=config.max_rows,
        max_tokens=config.max_tokens_in_flight,
        token_cache_mib=config.token_cache_mib,
        input_cache_mib=config.input_cache_mib,
    )
