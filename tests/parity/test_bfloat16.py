"""bfloat16 products against float32 ones, on real text."""

from pathlib import Path

import pytest
import torch
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import PlainSentence
from bilm_model.kernels.product_paths import Precision
from bilm_model.weights.loading import load

LEAST_COSINE = 0.9995
N_SENTENCES = 1000


def sentences(corpora: Path) -> list[PlainSentence]:
    """The first of WikiText-2's test part, cut after each full stop."""
    found: list[PlainSentence] = []
    tokens: list[str] = []
    for token in (corpora / "wikitext-2" / "test.txt").read_text(encoding="utf-8").split():
        tokens.append(token)
        if token == ".":
            found.append(PlainSentence(tuple(tokens)))
            tokens = []
            if len(found) == N_SENTENCES:
                break
    return found


def engine_of(source: str, precision: Precision) -> CellularBatch:
    return CellularBatch(load(source).bilm, torch.device("cpu"), EngineOptions(precision))


@pytest.mark.parametrize(
    "source",
    ["", *(pytest.param(f"random:{size}", marks=pytest.mark.slow) for size in ("small", "original"))],
    ids=lambda s: s or "shipped",
)
def test_every_vector_of_every_layer_points_the_same_way(source: str, corpora: Path) -> None:
    text = sentences(corpora)
    assert len(text) == N_SENTENCES
    exact, rounded = (engine_of(source, precision) for precision in ("float32", "bfloat16"))
    worst = torch.ones(3)
    for first in range(0, N_SENTENCES, 100):
        part = text[first : first + 100]
        for a, b in zip(exact.run(part), rounded.run(part), strict=True):
            cosines = torch.cosine_similarity(a.layers[:, 1:-1].double(), b.layers[:, 1:-1].double(), dim=-1)
            worst = torch.minimum(worst, cosines.amin(dim=1).float())
    print(f"{source or 'the model that ships'}: worst cosine, layer by layer: {worst.tolist()}")
    assert float(worst.min()) >= LEAST_COSINE
    assert float(worst.max()) < 1.0  # else nothing was rounded
