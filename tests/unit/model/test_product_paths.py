"""Which products a machine computes by, and that the choice depends on nothing but the facts that it is given."""

from functools import partial

import pytest
import torch
from bilm_model.kernels.product_paths import (
    Facts,
    ProductPath,
    Rates,
    choose,
    cpu_path,
    is_steady,
    measure_rates,
    packed_works,
    resolve_precision,
    training_path,
)
from bilm_model.kernels.products import BlockedProduct, NewProduct, PackedProduct, PlainProduct, Product
from torch import Tensor

BOTH, FLOAT32, NONE = frozenset({torch.float32, torch.bfloat16}), frozenset({torch.float32}), frozenset[torch.dtype]()
CPU = torch.device("cpu")
FAST, EMULATED = Rates(100, 200), Rates(100, 60)


@pytest.mark.parametrize(
    ("dtype", "facts", "expected"),
    [
        (torch.float32, Facts(BOTH, BOTH), ProductPath.PREPACKED),
        (torch.float32, Facts(FLOAT32, NONE), ProductPath.PREPACKED_BLOCKS),
        (torch.float32, Facts(NONE, NONE, FAST), ProductPath.PLAIN),
        (torch.float64, Facts(BOTH, BOTH), ProductPath.PLAIN),
        (torch.bfloat16, Facts(BOTH, BOTH, FAST), ProductPath.PREPACKED),
        (torch.bfloat16, Facts(BOTH, BOTH, Rates(100, 120)), ProductPath.PREPACKED),
        (torch.bfloat16, Facts(BOTH, BOTH, Rates(100, 119)), ProductPath.ROUNDED_PREPACKED),
        (torch.bfloat16, Facts(BOTH, FLOAT32, FAST), ProductPath.PREPACKED_BLOCKS),  # AMX
        (torch.bfloat16, Facts(FLOAT32, FLOAT32, FAST), ProductPath.PLAIN),
        (torch.bfloat16, Facts(NONE, NONE, FAST), ProductPath.PLAIN),
        (torch.bfloat16, Facts(BOTH, BOTH, EMULATED), ProductPath.ROUNDED_PREPACKED),  # AVX-512 without BF16
        (torch.bfloat16, Facts(FLOAT32, FLOAT32), ProductPath.ROUNDED_PREPACKED),  # AVX2
        (torch.bfloat16, Facts(FLOAT32, NONE), ProductPath.ROUNDED_PREPACKED_BLOCKS),
        (torch.bfloat16, Facts(NONE, NONE), ProductPath.ROUNDED_PLAIN),
    ],
)
def test_the_path_follows_from_the_facts(dtype: torch.dtype, facts: Facts, expected: ProductPath) -> None:
    assert choose(dtype, facts) is expected


@pytest.mark.parametrize("path", ProductPath)
def test_a_path_says_what_it_is(path: ProductPath) -> None:
    assert ("prepacked oneDNN products" in path.description) == path.steady
    assert ("in float32 of factors rounded to bfloat16" in path.description) == path.rounded


@pytest.mark.parametrize(
    ("setting", "path", "expected"),
    [
        ("auto", ProductPath.PREPACKED, "bfloat16"),
        ("auto", ProductPath.PLAIN, "bfloat16"),
        ("auto", ProductPath.ROUNDED_PREPACKED, "float32"),
        ("auto", ProductPath.ROUNDED_PLAIN, "float32"),
        ("bfloat16", ProductPath.ROUNDED_PLAIN, "bfloat16"),
        ("float32", ProductPath.PREPACKED, "float32"),
    ],
)
def test_auto_is_bfloat16_where_it_is_native(setting: str, path: ProductPath, expected: str) -> None:
    assert resolve_precision(setting, CPU, path) == expected


def test_this_machine_has_a_path_for_every_format() -> None:
    assert not cpu_path(torch.float32).rounded
    assert cpu_path(torch.bfloat16) is cpu_path(torch.bfloat16)
    assert training_path(torch.float64, "cpu") is training_path(torch.bfloat16, "cuda") is ProductPath.PLAIN
    assert training_path(torch.bfloat16, "cpu").rounded == cpu_path(torch.bfloat16).rounded


def test_operators_that_are_gone_do_not_work(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(PackedProduct):
        def __call__(self, x: Tensor) -> Tensor:
            raise NotImplementedError("no such operator")

    assert not packed_works(torch.float32, Gone)
    assert "no such operator" in caplog.text


def test_operators_that_compute_something_else_do_not_work() -> None:
    class Wrong(PackedProduct):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 1.5

    assert not packed_works(torch.float32, Wrong)


def test_operators_that_round_the_factors_of_large_products_do_not_work(caplog: pytest.LogCaptureFixture) -> None:
    """As ONEDNN_DEFAULT_FPMATH_MODE=BF16 has it."""

    class FastMath(PlainProduct):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x.bfloat16().float() if len(x) > 16 else x)

    assert packed_works(torch.float32, PlainProduct)
    assert not packed_works(torch.float32, FastMath)
    assert "prepacked float32 products not used" in caplog.text


def test_a_product_that_rounds_a_row_by_the_number_of_rows_is_found_out_and_put_into_blocks() -> None:
    class Unsteady(PlainProduct):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * (1 + len(x) * 1e-6)

    assert not is_steady(torch.float32, Unsteady)
    assert is_steady(torch.float32, partial(BlockedProduct, Unsteady))


class Stopwatch:
    """A clock that only products move, by `seconds` a number that they return."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sizes: list[int] = []

    def kind(self, seconds: float) -> NewProduct:
        def new(weight: Tensor, bias: Tensor | None = None, clip: float | None = None) -> Product:
            return lambda x: self._take(seconds, x, weight)

        return new

    def _take(self, seconds: float, x: Tensor, weight: Tensor) -> Tensor:
        self.now += seconds * len(x) * len(weight)
        self.sizes.append(len(weight))
        return x


@pytest.mark.parametrize(("factor", "sizes"), [(0.5, {256, 16384}), (1.0, {256, 16384}), (5.0, {256})])
def test_rates_are_those_of_the_large_product_or_of_a_small_one_where_bfloat16_is_hopeless(
    factor: float, sizes: set[int]
) -> None:
    watch = Stopwatch()
    rates = measure_rates(watch.kind(1e-8), watch.kind(factor * 1e-8), lambda: watch.now)
    assert rates.float32 == pytest.approx(2 * 512 / 1e-8 / 1e9)
    assert rates.bfloat16 == pytest.approx(rates.float32 / factor)
    assert set(watch.sizes) == sizes


def test_the_measurement_takes_fifty_milliseconds() -> None:
    watch = Stopwatch()
    measure_rates(watch.kind(5e-9), watch.kind(4e-9), lambda: watch.now)
    assert watch.now < 0.05 + 2 * 128 * 16384 * 9e-9


def test_a_slow_machine_measures_each_product_twice() -> None:
    watch = Stopwatch()
    measure_rates(watch.kind(1e-6), watch.kind(1e-6), lambda: watch.now)
    assert watch.sizes.count(16384) == 4
