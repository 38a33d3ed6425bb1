import pytest
import torch
from bilm_model.engine import packed
from bilm_model.engine.packed import PackedProduct, PlainProduct, cpu_product, padded_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_product_is_the_product(dtype: torch.dtype, clip: float | None, has_bias: bool) -> None:
    if cpu_product() is not PackedProduct:
        pytest.skip("this torch has no prepacked products")
    generator = torch.Generator().manual_seed(1)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((40, 24), (40,), (7, 24)))
    arguments = (weight.to(dtype), bias if has_bias else None, clip)
    found, expected = (kind(*arguments)(x.to(dtype)) for kind in (PackedProduct, PlainProduct))
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 0.2)
    if clip is not None:
        assert float(found.float().abs().max()) == clip


def test_without_the_operators_plain_products_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    class Gone(PackedProduct):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no such operator")

    monkeypatch.setattr(packed, "PackedProduct", Gone)
    packed._works.cache_clear()
    request.addfinalizer(packed._works.cache_clear)
    assert cpu_product() is PlainProduct
    assert "no such operator" in caplog.text


@pytest.mark.parametrize("n_rows", [1, 2, 3, 64, 65, 100, 1000, 1024, 1025, 70_000])
def test_rows_are_rounded_up_to_few_numbers(n_rows: int) -> None:
    assert n_rows <= padded_rows(n_rows) <= max(4, n_rows * 9 / 8 + 1)


def test_the_numbers_are_few() -> None:
    assert len({padded_rows(n) for n in range(64, 10_000)}) < 70
