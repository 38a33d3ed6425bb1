import numpy as np
import pytest
import torch
from bilm_model.scalar_mix import LayerMix, Selection

LAYERS = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
INNER = LAYERS[:, 1:-1].numpy()


@pytest.mark.parametrize(("layers", "expected"), [("all", INNER), ("top", INNER[2]), ("average", INNER.mean(axis=0))])
def test_layers(layers: str, expected: np.ndarray) -> None:
    found = Selection(layers)(LAYERS)  # type: ignore[arg-type]
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_mix_is_the_papers_formula() -> None:
    weights = np.array([0.3, -1.0, 2.0])
    shares = np.exp(weights) / np.exp(weights).sum()
    found = Selection(LayerMix((0.3, -1.0, 2.0), gamma=1.5))(LAYERS)
    assert np.allclose(found.numpy(), 1.5 * np.einsum("l,ltd->td", shares, INNER), atol=1e-6)


def test_layer_norm_counts_the_boundaries() -> None:
    numbers = LAYERS.numpy()
    normed = (numbers - numbers.mean(axis=(1, 2), keepdims=True)) / numbers.std(axis=(1, 2), keepdims=True)
    found = Selection(LayerMix((0.0, 0.0, 0.0), layer_norm=True))(LAYERS)
    assert np.allclose(found.numpy(), normed.mean(axis=0)[1:-1], atol=1e-5)


@pytest.mark.parametrize(("pooling", "expected"), [("mean", INNER.mean(axis=1)), ("max", INNER.max(axis=1))])
def test_pooling(pooling: str, expected: np.ndarray) -> None:
    found = Selection("all", pooling)(LAYERS)  # type: ignore[arg-type]
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_l2_norm_leaves_zero_alone() -> None:
    layers = LAYERS.clone()
    layers[2, 3] = 0.0
    found = Selection("top", l2_normalize=True)(layers)
    assert found.norm(dim=-1).tolist() == pytest.approx([1, 1, 0, 1, 1])


@pytest.mark.parametrize("layers", ["all", "top", "average", LayerMix((0.0, 0.0, 0.0), layer_norm=True)])
def test_a_sentence_without_tokens_has_no_rows(layers: object) -> None:
    found = Selection(layers)(torch.zeros(3, 0, 4))  # type: ignore[arg-type]
    assert found.shape[-2:] == (0, 4)
