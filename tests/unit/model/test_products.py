from functools import partial

import pytest
import torch
from bilm_model.kernels.product_paths import ProductPath, cpu_path
from bilm_model.kernels.products import (
    BlockedProduct,
    NewProduct,
    PackedProduct,
    PlainProduct,
    RoundedProduct,
    padded_rows,
)

from tests.unit.model.machine_support import NoBfloat16Products, needs_bfloat16

KINDS = {
    "prepacked float32": (torch.float32, PackedProduct),
    "prepacked bfloat16": (torch.bfloat16, PackedProduct),
    "prepacked, rounded": (torch.bfloat16, partial(RoundedProduct, PackedProduct)),
    "plain, rounded": (torch.bfloat16, partial(RoundedProduct, PlainProduct)),
}


@pytest.mark.parametrize(("dtype", "kind"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_kind_of_product_is_the_product(
    dtype: torch.dtype, kind: NewProduct, clip: float | None, has_bias: bool
) -> None:
    if kind is PackedProduct and dtype == torch.bfloat16:
        needs_bfloat16()
    if kind is PackedProduct and not cpu_path(torch.float32).steady:
        pytest.skip("this torch has no prepacked products")
    generator = torch.Generator().manual_seed(1)
    weight, bias, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 24), (40,), (7, 24)))
    found = kind(weight, bias if has_bias else None, clip)(x)
    exact = x.double() @ weight.double().t() + (bias.double() if has_bias else 0.0)
    if clip is not None:
        exact = exact.clamp(-clip, clip)
        assert float(found.float().abs().max()) == clip
    assert found.dtype == dtype
    # Rounded once: half a unit in the last place, and what the order of sums makes of it
    assert torch.allclose(found.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 0.0, atol=1e-5)


def test_a_rounded_product_takes_factors_of_any_format_for_bfloat16_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((40, 24), (40,), (7, 24)))
    kind = ProductPath.ROUNDED_PLAIN.new_product
    with NoBfloat16Products():
        found = kind(weight, bias)(x)
        expected = kind(weight.bfloat16(), bias.bfloat16())(x.bfloat16())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("n_rows", [1, 3, 64, 65, 300])
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(n_rows: int) -> None:
    paths = {dtype: cpu_path(dtype) for dtype in (torch.float32, torch.bfloat16)}
    if not all(path.steady for path in paths.values()):
        pytest.skip("without prepacked products only 1e-5 is promised")
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((512, 2080), (padded_rows(n_rows), 2080)))
    for dtype, path in paths.items():
        product = path.new_product(weight.to(dtype))
        few = product(x[: padded_rows(1)].to(dtype))
        assert torch.equal(product(x.to(dtype))[:1], few[:1])


@pytest.mark.parametrize("n_rows", [1, 64, 65, 200])
def test_blocks_of_rows_are_the_rows(n_rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(5, 7, generator=generator), torch.randn(n_rows, 7, generator=generator)
    found = BlockedProduct(PlainProduct, weight, clip=1.0)(x)
    assert found.shape == (n_rows, 5)
    assert torch.allclose(found, PlainProduct(weight, clip=1.0)(x), atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 17, 33, 64, 65, 100, 1000, 1024, 1025, 70_000])
def test_rows_are_rounded_up_to_few_numbers(n_rows: int) -> None:
    assert n_rows <= padded_rows(n_rows) <= max(4, n_rows * 9 / 8 + 1)


def test_the_numbers_are_few() -> None:
    assert len({padded_rows(n) for n in range(1, 10_000)}) < 85
