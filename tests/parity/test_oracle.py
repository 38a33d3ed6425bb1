"""What the golden vectors don't cover, against an independent float64 implementation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.characters import character_ids, with_boundaries
from bilm_model.config import BilmConfig, to_options
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import PlainSentence
from bilm_model.kernels.product_paths import Precision
from bilm_model.weights import hdf5

from tests.parity.oracle import Oracle

BASE = BilmConfig(char_dim=4, filters=((1, 6), (3, 10), (7, 8)), projection_dim=12, cell_dim=40)
CONFIGS = {
    "as published": BASE,
    "no residual": replace(BASE, residual="none"),
    "four layers, no residual": replace(BASE, residual="none", n_layers=4),
    "input to input": replace(BASE, residual="input_to_input"),
    "three layers, input to input": replace(BASE, residual="input_to_input", n_layers=3),
    "one layer": replace(BASE, n_layers=1),
    "three layers, tanh, no highway": replace(BASE, n_layers=3, activation="tanh", n_highway=0),
    "no CNN projection": replace(BASE, projection_dim=24),
    "no LSTM projection": replace(BASE, cell_dim=12),
    "neither projection": replace(BASE, projection_dim=24, cell_dim=24, n_highway=2),
    "tight clips": replace(BASE, cell_clip=0.1, proj_clip=0.05),
    "widest filter": replace(BASE, filters=((50, 5), (1, 3))),
}
SENTENCES = [["The", "cat"], ["대한민국", "x" * 60, "🙂", "<S>", "\x00"], ["a"] * 23]


def _model(config: BilmConfig, folder: Path, precision: Precision = "float32") -> tuple[CellularBatch, Bilm, Oracle]:
    """Random weights and biases, through the published file, which the oracle reads with eyes of its own."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in random_bilm(config).state_dict().items()
    }
    path = folder / "weights.hdf5"
    hdf5.write(path, config, tensors)
    engine = CellularBatch(
        Bilm.from_tensors(config, hdf5.read(path, config)), torch.device("cpu"), EngineOptions(precision)
    )
    reference = Bilm.from_tensors(config, hdf5.read(path, config)).double()
    return engine, reference, Oracle(path, to_options(config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_agrees_with_the_oracle(config: BilmConfig, tmp_path: Path) -> None:
    engine, reference, oracle = _model(config, tmp_path)
    expected = [oracle(tokens) for tokens in SENTENCES]
    for embedded, numbers in zip(engine.run([PlainSentence(tokens) for tokens in SENTENCES]), expected, strict=True):
        assert np.abs(embedded.layers[:, 1:-1].numpy() - numbers).max() < 1e-5
    # In float64 nothing but the formulae can differ
    for tokens, numbers in zip(SENTENCES, expected, strict=True):
        ids = torch.from_numpy(character_ids(with_boundaries(tokens))).long()
        layers, _ = reference(ids, [len(ids)])
        assert np.abs(layers[:, 1:-1].numpy() - numbers).max() < 1e-12


def test_bfloat16_products_stay_close(tmp_path: Path) -> None:
    engine, _, oracle = _model(BASE, tmp_path, "bfloat16")
    for tokens, embedded in zip(SENTENCES, engine.run([PlainSentence(tokens) for tokens in SENTENCES]), strict=True):
        found, expected = embedded.layers[:, 1:-1].double().numpy(), oracle(tokens)
        norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert ((found * expected).sum(axis=-1) / norms).min() > 0.999
        assert not np.array_equal(found, expected)
