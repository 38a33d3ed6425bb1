import pytest
import torch
from bilm_model.affine import Affine
from bilm_model.engine import packed
from bilm_model.engine.packed import PackedAffine, pack_products, padded_rows
from torch import nn


def test_few_kernels_and_little_padding() -> None:
    sizes = range(1, 4097)
    assert all(n <= padded_rows(n) <= max(2, n * 9 / 8) for n in sizes)
    assert len({padded_rows(n) for n in sizes}) < 120


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 63, 65, 100, 1000])
def test_a_packed_product_is_the_product(n_rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    affine = Affine(48, 20, bias=bias)
    for parameter in affine.parameters():
        nn.init.normal_(parameter)
    affine.requires_grad_(False)
    x = torch.randn(n_rows, 48)
    assert torch.allclose(PackedAffine(affine)(x), affine(x), atol=1e-4)


def test_without_the_operators_the_network_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(affine: Affine) -> nn.Module:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed, "PackedAffine", missing)
    network = nn.Sequential(Affine(4, 4))
    assert not pack_products(network)
    assert isinstance(network[0], Affine)
    assert "prepacked products are not to be had" in caplog.text
