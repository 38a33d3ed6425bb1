"""The published numbers."""

import json
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence
from bilm_model.weights.loading import load

TOLERANCE = 1e-5


class Golden:
    def __init__(self, folder: Path) -> None:
        self.sentences: list[list[str]] = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
        self.engine = CellularBatch(load(str(folder)).bilm, torch.device("cpu"))
        with h5py.File(folder / "expected.hdf5") as file:
            self.stateless = [file[f"stateless/{i}"][()] for i in range(len(self.sentences))]
            self.batches: list[list[int]] = json.loads(file["stateful"].attrs["batches"])
            self.stateful = [
                [file[f"stateful/{b}/{j}"][()] for j in range(len(batch))] for b, batch in enumerate(self.batches)
            ]


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Golden:
    return Golden(golden)


def _error(found: EmbeddedSentence, expected: np.ndarray[Any, Any]) -> float:
    layers = found.layers[:, 1:-1].numpy()
    assert layers.shape == expected.shape
    return float(np.abs(layers - expected).max(initial=0.0))


def test_each_sentence_alone(vectors: Golden) -> None:
    for tokens, expected in zip(vectors.sentences, vectors.stateless, strict=True):
        assert _error(vectors.engine.run([PlainSentence(tokens)])[0], expected) < TOLERANCE


def test_all_in_one_batch_in_any_order(vectors: Golden) -> None:
    for seed in range(5):
        order = random.Random(seed).sample(range(len(vectors.sentences)), len(vectors.sentences))
        found = vectors.engine.run([PlainSentence(vectors.sentences[i]) for i in order])
        for i, embedded in zip(order, found, strict=True):
            assert _error(embedded, vectors.stateless[i]) < TOLERANCE


def test_carried_state_one_a_row(vectors: Golden) -> None:
    states: dict[int, Any] = {}
    for batch, expected in zip(vectors.batches, vectors.stateful, strict=True):
        found = vectors.engine.run([PlainSentence(vectors.sentences[i], states.get(j)) for j, i in enumerate(batch)])
        for j, embedded in enumerate(found):
            states[j] = (embedded.h.numpy(), embedded.c.numpy())
            assert _error(embedded, expected[j]) < TOLERANCE
