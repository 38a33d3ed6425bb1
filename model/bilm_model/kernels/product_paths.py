"""How products are computed on this machine, for each number format.

A machine may have fast bfloat16 products, emulate them slowly (AVX-512 without its BF16 extension), or have none
(AVX2). What it has is found out once a process, as `Facts`; `choose` decides by them and by nothing else. Whoever
computes products takes a `ProductPath` as an argument, so that any path runs on any machine.
"""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bilm_model.kernels.fallbacks import note_fallback
from bilm_model.kernels.products import (
    BLOCK_ROWS,
    BlockedProduct,
    NewProduct,
    PackedProduct,
    PlainProduct,
    Product,
    RoundedProduct,
)

Precision = Literal["float32", "bfloat16"]

_log = logging.getLogger(__name__)

_NATIVE = 1.2
"""Times float32's rate from which bfloat16 products count as native. Real ones reach 2 (AMD EPYC) and more (Intel's
AMX), emulated ones 1 at most, so that noise doesn't decide."""

_ROWS, _IN, _OUT = 128, 512, 16384
_SMALL_OUT = 256
_TELLING_SIZES, _TELLING_ROWS = ((128, 512), (512, 2048), (96, 37)), (4, 16, 32, 64, 128, 288)
_MEASURED_S = 0.05
_MIN_TURNS, _MAX_TURNS = 2, 8
_HOPELESS = 3.0
"""Times float32's time at which the small product ends the measurement: the large one would take a second."""


class ProductPath(StrEnum):
    """A way to compute products; the values are labels of the metric `bilm_kernel_path`."""

    PREPACKED = "prepacked"
    PREPACKED_BLOCKS = "prepacked_blocks"
    PLAIN = "plain"
    ROUNDED_PREPACKED = "rounded_prepacked"
    ROUNDED_PREPACKED_BLOCKS = "rounded_prepacked_blocks"
    ROUNDED_PLAIN = "rounded_plain"

    @property
    def description(self) -> str:
        """The path in words."""
        name = _NAMES[self.removeprefix(_ROUNDED)]
        return f"{name} in float32 of factors rounded to bfloat16" if self.rounded else name

    @property
    def steady(self) -> bool:
        """Whether a row's bits don't depend on the number of rows."""
        return self not in (ProductPath.PLAIN, ProductPath.ROUNDED_PLAIN)

    @property
    def block_rows(self) -> int | None:
        """Rows that a product always has, so that it needs the same number of threads each time; None: as they come."""
        return BLOCK_ROWS if self.endswith(_BLOCKS) else None

    @property
    def rounded(self) -> bool:
        """Whether these are float32 products that stand in for bfloat16 ones."""
        return self.startswith(_ROUNDED)

    @property
    def new_product(self) -> NewProduct:
        """Return what makes such products."""
        kind = _KINDS[self.removeprefix(_ROUNDED)]
        return functools.partial(RoundedProduct, kind) if self.rounded else kind

    def multiply(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a (N, K)·b (K, M) of factors rounded to `dtype`, (N, M) in `dtype`; gradients don't pass."""
        a, b = a.to(dtype), b.to(dtype)
        return (a.float() @ b.float()).to(dtype) if self.rounded else a @ b


_ROUNDED, _BLOCKS = "rounded_", "_blocks"
_NAMES = {
    "prepacked": "prepacked oneDNN products",
    "prepacked_blocks": "prepacked oneDNN products in blocks of rows",
    "plain": "plain products",
}
_KINDS: dict[str, NewProduct] = {
    "prepacked": PackedProduct,
    "prepacked_blocks": functools.partial(BlockedProduct, PackedProduct),
    "plain": PlainProduct,
}


@dataclass(frozen=True)
class Rates:
    """Rates of the product at 128 rows, 512 -> 16384, in GFLOP/s."""

    float32: float
    bfloat16: float


@dataclass(frozen=True)
class Facts:
    """What a machine, and the torch on it, can do.

    Attributes:
        packed: formats in which prepacked products work.
        steady: those of them in which a row's bits don't depend on the number of rows.
        rates: of the products that would be used; None where bfloat16 products are missing, or the rates aren't needed.
    """

    packed: frozenset[torch.dtype]
    steady: frozenset[torch.dtype]
    rates: Rates | None = None


def choose(dtype: torch.dtype, facts: Facts) -> ProductPath:
    """Return the path for products of `dtype` on a CPU. The only inputs are the arguments."""
    native = facts.rates is not None and facts.rates.bfloat16 >= _NATIVE * facts.rates.float32
    rounded = dtype == torch.bfloat16 and not native
    computed_in = torch.float32 if rounded else dtype
    kind = "plain"
    if computed_in in facts.packed:
        kind = "prepacked" if computed_in in facts.steady else "prepacked_blocks"
    return ProductPath(_ROUNDED + kind if rounded else kind)


def cpu_path(dtype: torch.dtype) -> ProductPath:
    """Return the path for products of `dtype` on this machine's CPU. The first call for bfloat16 takes 0.1 s."""
    return choose(dtype, cpu_facts(dtype))


def training_path(dtype: torch.dtype, device_type: str) -> ProductPath:
    """Return the path for products of `dtype` in training, where all rows belong together; a GPU's are torch's own."""
    if device_type != "cpu":
        return ProductPath.PLAIN
    facts = cpu_facts(dtype)
    return choose(dtype, replace(facts, steady=facts.packed))


def resolve_precision(precision: str, device: torch.device, bfloat16: ProductPath | None = None) -> Precision:
    """Return the precision that a setting stands for on a device.

    Args:
        precision: "float32", "bfloat16", or "auto": bfloat16 where its products are native, else float32.
        device: the device that computes.
        bfloat16: path of bfloat16 products on the CPU; None: found out.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere: the first with bfloat16 products
        else:
            native = not (bfloat16 or cpu_path(torch.bfloat16)).rounded
        return "bfloat16" if native else "float32"
    return "bfloat16" if precision == "bfloat16" else "float32"


# ---- the facts -------------------------------------------------------------------------------------------------------


@functools.cache
def cpu_facts(dtype: torch.dtype) -> Facts:
    """Return what has to be known for products of `dtype`; found out once a process."""
    if dtype != torch.bfloat16:
        return _facts_of(dtype) if dtype == torch.float32 else Facts(frozenset(), frozenset())
    float32 = cpu_facts(torch.float32)
    if not has_bfloat16_products():
        _log.info("bfloat16 products: this processor has none (torch %s)", torch.__version__)
        return float32
    bfloat16 = _facts_of(torch.bfloat16)
    new_float32, new_bfloat16 = (PackedProduct if each.packed else PlainProduct for each in (float32, bfloat16))
    rates = measure_rates(new_float32, new_bfloat16)
    facts = Facts(float32.packed | bfloat16.packed, float32.steady | bfloat16.steady, rates)
    _log.info(
        "bfloat16 products: %.0f GFLOP/s, float32 %.0f GFLOP/s at %d rows, %d -> %d, one thread: %s",
        rates.bfloat16, rates.float32, _ROWS, _IN, _OUT,
        "not native" if choose(torch.bfloat16, facts).rounded else "native",
    )  # fmt: skip
    return facts


def _facts_of(dtype: torch.dtype) -> Facts:
    packed = frozenset({dtype} if packed_works(dtype) else ())
    return Facts(packed, frozenset({dtype} if packed and is_steady(dtype) else ()))


def has_bfloat16_products() -> bool:
    """Return whether oneDNN computes bfloat16 products at all, native or emulated; True where torch can't tell."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, NotImplementedError, RuntimeError):
        return True


@torch.no_grad()
def packed_works(dtype: torch.dtype, kind: NewProduct = PackedProduct) -> bool:
    """Try prepacked operators, which a release of torch may change or leave out, and compare with exact products.

    Few rows and many: ONEDNN_DEFAULT_FPMATH_MODE=BF16 makes bfloat16 products of large float32 ones only.

    Args:
        dtype: format of the products.
        kind: what makes them.
    """
    name = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((512, 512), (512,), (_ROWS, 512)))
    weight, bias, x = (weight / 512**0.5).to(dtype), bias.to(dtype), x.to(dtype)
    try:
        product = kind(weight, bias, 3.0)
        found = torch.cat([product(x[:3]), product(x)])
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        note_fallback("products", f"prepacked {name} products unavailable with torch {torch.__version__}", error)
        return False
    exact = F.linear(x.double(), weight.double(), bias.double()).clamp(-3.0, 3.0)
    distance = float((found.double() - torch.cat([exact[:3], exact])).abs().max())
    bound = 0.02 if dtype == torch.bfloat16 else 1e-4
    if not distance <= bound:  # nan compares as False
        wrong = RuntimeError(f"off by {distance:.2g}, expected at most {bound:g}")
        note_fallback("products", f"prepacked {name} products not used", wrong)
        return False
    return True


@torch.no_grad()
def is_steady(dtype: torch.dtype, kind: NewProduct = PackedProduct) -> bool:
    """Return whether products round a row the same whatever the number of rows, by trying sizes that tell.

    With AMX, oneDNN cuts the sums of bfloat16 products differently for different numbers of rows, at these sizes.
    """
    generator = torch.Generator().manual_seed(0)
    for n_out, n_in in _TELLING_SIZES:
        weight, x = (torch.randn(n, n_in, generator=generator).to(dtype) for n in (n_out, _TELLING_ROWS[-1]))
        product = kind(weight)
        all_rows = product(x)
        if not all(torch.equal(product(x[:n]), all_rows[:n]) for n in _TELLING_ROWS):
            return False
    return True


@torch.no_grad()
def measure_rates(
    new_float32: NewProduct, new_bfloat16: NewProduct, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """Measure both kinds of products in turns, 50 ms of them after the weights are laid out; the fastest turn counts.

    A small product comes first: where bfloat16 is slow beyond doubt, its rates are the answer. One thread computes: on
    a busy machine two would wait for each other, each time for as long as other processes have a core.

    Args:
        new_float32: makes float32 products.
        new_bfloat16: makes bfloat16 products.
        clock: time in seconds.
    """
    kinds = ((new_float32, torch.float32), (new_bfloat16, torch.bfloat16))
    for n_out in (_SMALL_OUT, _OUT):
        products = [new(torch.ones(n_out, _IN, dtype=dtype)) for new, dtype in kinds]
        xs = [torch.ones(_ROWS, _IN, dtype=dtype) for _, dtype in kinds]
        with _one_thread():
            float32_s, bfloat16_s = _fastest(list(zip(products, xs, strict=True)), clock)
        if bfloat16_s > _HOPELESS * float32_s:
            break
    giga = 2e-9 * _ROWS * _IN * n_out
    return Rates(giga / float32_s, giga / bfloat16_s)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fastest(calls: Sequence[tuple[Product, Tensor]], clock: Callable[[], float]) -> list[float]:
    """Return the shortest time of each call, in seconds, taken in turns."""
    times: list[list[float]] = [[] for _ in calls]
    begun_s = clock()
    for turn in itertools.count(1):
        for (product, x), taken in zip(calls, times, strict=True):
            before_s = clock()
            product(x)
            taken.append(clock() - before_s)
        if turn == _MAX_TURNS or (turn >= _MIN_TURNS and clock() - begun_s > _MEASURED_S):
            break
    return [min(taken) for taken in times]
