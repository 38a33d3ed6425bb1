"""The fastest products of the LSTM cells' shapes that this machine runs, and how much of them a token needs.

Legend: R rows, C cells, P projection.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bilm_model.config import BilmConfig
from torch import Tensor

ROWS = 128
_SLICE_S = 0.1

Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """A product (ROWS, n_in) -> (ROWS, n_out) that a token takes part in `per_token` times."""

    n_in: int
    n_out: int
    per_token: int

    @property
    def multiply_adds(self) -> int:
        """Of all its occurrences, for a token."""
        return self.n_in * self.n_out * self.per_token


def lstm_shapes(config: BilmConfig, *, without_first_input: bool = False) -> list[Shape]:
    """Return the cells' products, layers and directions together: input and state (P -> 4·C), projection (C -> P)."""
    cells = 2 * config.n_layers
    n_gates = 2 * cells - (2 if without_first_input else 0)
    shapes = [Shape(config.projection_dim, 4 * config.cell_dim, n_gates)]
    if config.has_lstm_projection:
        shapes.append(Shape(config.cell_dim, config.projection_dim, cells))
    return shapes


def multiply_adds(config: BilmConfig, *, without_first_input: bool = False) -> int:
    """Return the multiply-adds of a token or boundary in the LSTMs; the token's vector comes from the cache."""
    return sum(shape.multiply_adds for shape in lstm_shapes(config, without_first_input=without_first_input))


class Roofline:
    """Tries several ways to compute each product.

    Args:
        config: of the model whose products these are.
        dtype: of both factors.
    """

    def __init__(self, config: BilmConfig, dtype: torch.dtype) -> None:
        self._shapes = lstm_shapes(config)
        self._ways = {shape: _ways(shape, dtype) for shape in self._shapes}
        self.found: dict[str, list[float]] = {}

    @torch.inference_mode()
    def multiply_adds_per_s(self) -> float:
        """Return the rate of the fastest ways, each shape weighted by its share of a token's multiply-adds."""
        seconds = 0.0
        for shape, ways in self._ways.items():
            rates = {way: _rate(product) * ROWS * shape.n_in * shape.n_out for way, product in ways.items()}
            for way, rate in rates.items():
                self.found.setdefault(f"{shape.n_in} -> {shape.n_out}, {way}", []).append(2e-9 * rate)
            seconds += shape.multiply_adds / max(rates.values())
        return sum(shape.multiply_adds for shape in self._shapes) / seconds


def _ways(shape: Shape, dtype: torch.dtype) -> dict[str, Product]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, shape.n_in, generator=generator).to(dtype)
    weight = torch.randn(shape.n_out, shape.n_in, generator=generator).to(dtype)
    transposed = weight.t().contiguous()
    ways: dict[str, Product] = {"F.linear": lambda: F.linear(x, weight), "torch.mm": lambda: torch.mm(x, transposed)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        prepacked: Product = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # noqa: E731
        prepacked()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        print(f"no prepacked products here: {error}")
    else:
        ways["oneDNN, prepacked"] = prepacked
    return ways


def _rate(product: Product) -> float:
    """Return the calls a second."""
    product()
    calls, begun_s = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begun_s) < _SLICE_S or calls < 3:
        product()
        calls += 1
    return calls / seconds
