"""On a CPU a sentence's bits don't depend on what else is computed, in either precision."""

import random
from dataclasses import replace

import pytest
import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES, BilmConfig
from bilm_model.engine.batch import BatchEngine, EmbeddedSentence, Precision, Sentence
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIGS = {
    "tiny": SIZES["tiny"],
    "odd sizes": BilmConfig(5, ((1, 7), (2, 9), (3, 17)), projection_dim=13, cell_dim=37, n_highway=2),
    "long vectors": replace(SIZES["tiny"], cell_dim=2080, projection_dim=24),
    "tanh": replace(SIZES["tiny"], activation="tanh", n_layers=3, use_skip_connections=False),
}
SENTENCE = st.lists(st.text(min_size=1, max_size=60), max_size=12)


def engine_of(config: BilmConfig, precision: Precision) -> BatchEngine:
    engine = BatchEngine(random_bilm(config), torch.device("cpu"), precision)
    if "prepacked" not in engine.backend:
        pytest.skip(f"without prepacked products only 1e-5 is promised: {engine.backend}")
    return engine


def same_bits(found: EmbeddedSentence, expected: EmbeddedSentence) -> bool:
    pairs = ((found.layers, expected.layers), (found.h, expected.h), (found.c, expected.c))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_random_batches(config: BilmConfig, precision: Precision) -> None:
    engine = engine_of(config, precision)
    shuffler = random.Random(5)
    words = [f"{'w' * shuffler.randrange(9)}{i}" for i in range(70)]
    texts = [shuffler.choices(words, k=shuffler.randrange(0, 25)) for _ in range(60)]
    states = [engine.run([Sentence(["state", str(i)])])[0] for i in range(3)]
    carried = [None, *((state.h.numpy(), state.c.numpy()) for state in states)]
    sentences = [Sentence(text, shuffler.choice(carried)) for text in texts]
    alone = [engine.run([sentence])[0] for sentence in sentences]
    for _ in range(12):
        chosen = shuffler.sample(range(60), shuffler.randrange(1, 61))
        for i, found in zip(chosen, engine.run([sentences[i] for i in chosen]), strict=True):
            assert same_bits(found, alone[i])


@settings(max_examples=50, deadline=None)
@given(st.lists(SENTENCE, min_size=1, max_size=8))
def test_any_text(sentences: list[list[str]]) -> None:
    engine = engine_of(SIZES["tiny"], "float32")
    together = engine.run([Sentence(tokens) for tokens in sentences])
    for tokens, found in zip(sentences, together, strict=True):
        assert found.layers.shape == (3, len(tokens) + 2 if tokens else 0, 16)
        assert same_bits(found, engine.run([Sentence(tokens)])[0])


def test_threads_change_nothing() -> None:
    engine = engine_of(SIZES["tiny"], "float32")
    sentences = [Sentence([f"word{i}"] * (i + 1)) for i in range(40)]
    one = engine.run(sentences)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = engine.run(sentences)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True))
