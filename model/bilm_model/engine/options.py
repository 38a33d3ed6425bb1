"""What can be chosen of a recurrent engine.

Legend: L layers with the token layer, D width.
"""

from dataclasses import dataclass, replace

import torch

from bilm_model.config import BilmConfig
from bilm_model.engine.backend import Memory
from bilm_model.kernels.product_paths import Precision, ProductPath

_ROWS_ON_A_CPU, _ROWS_ON_A_GPU = 128, 1024
_INPUT_CACHE_MIB_ON_A_CPU = 128
_MIB = 2**20
_NAME_BYTES = 192
"""Of a token in the table: its text, its entry and their places in a dictionary; 164 were measured for words of 3 to 14
letters."""


@dataclass(frozen=True)
class EngineOptions:
    """What can be chosen.

    Attributes:
        precision: of the products; everything else is in float32.
        max_rows: sentences computed at a time; None: 128 on a CPU, 1024 on a GPU.
        max_tokens: tokens and boundaries of the sentences in flight; each takes (L - 1)·D·4 bytes for its outputs.
        token_cache_mib: for vectors and names of tokens that no sentence in flight has; 0: none are kept.
        input_cache_mib: for layer 1's input projections; 0: none are kept; None: 128 on a CPU, 0 on a GPU,
            where computing them again is as fast as looking them up. Small cells in bfloat16 on a CPU with AMX, which
            project their inputs themselves in any case, have none.
        products: how a CPU computes products; None: the fastest way that works here, see `cpu_path`.
    """

    precision: Precision = "float32"
    max_rows: int | None = None
    max_tokens: int = 65_536
    token_cache_mib: int = 64
    input_cache_mib: int | None = None
    products: ProductPath | None = None

    def resolved(self, device: torch.device) -> "EngineOptions":
        """Return these options with what is None replaced by what it means on a device."""
        on_gpu = device.type == "cuda"
        input_cache_mib = 0 if on_gpu else _INPUT_CACHE_MIB_ON_A_CPU
        return replace(
            self,
            max_rows=self.max_rows or (_ROWS_ON_A_GPU if on_gpu else _ROWS_ON_A_CPU),
            input_cache_mib=input_cache_mib if self.input_cache_mib is None else self.input_cache_mib,
        )

    @property
    def input_cache_bytes(self) -> int:
        """Return the size of layer 1's cache of input projections; 0 where it isn't set."""
        return (self.input_cache_mib or 0) * _MIB

    def n_cached(self, config: BilmConfig) -> int:
        """Return how many vectors of tokens are kept that no sentence in flight has."""
        return self.token_cache_mib * _MIB // (4 * config.projection_dim + _NAME_BYTES)

    def name_bytes(self, config: BilmConfig) -> int:
        """Return how much of the host's memory the names of these tokens take."""
        return self.n_cached(config) * _NAME_BYTES

    def memory(self, config: BilmConfig, device: torch.device) -> Memory:
        """Allocate what outlives a round; on the device "meta" there are shapes only."""
        n_rows = self.max_rows or 0
        return Memory.of(config, device, n_rows, self.max_tokens, self.max_tokens + self.n_cached(config))

    def memory_bytes(self, config: BilmConfig, device: torch.device) -> int:
        """Return how much that is on a device, without allocating it."""
        memory = self.resolved(device).memory(config, torch.device("meta"))
        return sum(tensor.nbytes for tensor in (memory.vectors, memory.outputs, memory.h, memory.c))
