"""The model as the service sees it: loaded, on its device, with its tokenizer."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from bilm_api.constants import Reason
from bilm_model.config import BilmConfig
from bilm_model.device import default_threads, resolve_device
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.state import LstmStateCodec
from bilm_model.engine.types import Engine
from bilm_model.errors import ModelError
from bilm_model.kernels.fallbacks import fallback_counts
from bilm_model.kernels.kernel_cache import CachedKernels, keep_triton_kernels, use_store
from bilm_model.kernels.product_paths import Precision, ProductPath, resolve_precision
from bilm_model.tokenization.types import Tokenizer
from bilm_model.weights.loading import load

from bilm_server.config import ServerConfig
from bilm_server.errors import RefusalError
from bilm_server.preflight import configured_tokenizer, served_name


@dataclass(frozen=True)
class ServedModel:
    """One model and what belongs to it.

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

    @property
    def state_bytes(self) -> int:
        """Bytes of a state; 0 for a model without states."""
        codec = self.engine.state_codec
        return 0 if codec is None else codec.n_bytes

    def check(self, name: str, expected_version: str) -> None:
        """Make sure that a request means this model; "" means any.

        Raises:
            RefusalError: MODEL_NOT_FOUND or MODEL_VERSION_MISMATCH.
        """
        if name not in ("", self.name):
            raise RefusalError(Reason.MODEL_NOT_FOUND, f"the model served here is {self.name}")
        if expected_version not in ("", self.version):
            raise RefusalError(Reason.MODEL_VERSION_MISMATCH, f"the version served here is {self.version}")


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
