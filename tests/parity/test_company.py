"""On a CPU a sentence's bits don't depend on what else is computed, in either precision."""

import random
from dataclasses import replace
from functools import partial
from typing import get_args
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES, BilmConfig
from bilm_model.engine.backend import Backend, Memory
from bilm_model.engine.backends import new_backend
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence
from bilm_model.engine.state import LstmStateCodec
from bilm_model.engine.types import Capacity, EngineResult
from bilm_model.kernels.product_paths import Precision, ProductPath, has_bfloat16_products
from bilm_model.weights.loading import load
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIGS = {
    "tiny": SIZES["tiny"],
    "odd sizes": BilmConfig(5, ((1, 7), (2, 9), (3, 17)), projection_dim=13, cell_dim=37, n_highway=2),
    "long vectors": replace(SIZES["tiny"], cell_dim=2080, projection_dim=24),
    "tanh": replace(SIZES["tiny"], activation="tanh", n_layers=3, residual="none"),
    "input to input": replace(SIZES["tiny"], n_layers=3, residual="input_to_input"),
}
BACKENDS: WeakKeyDictionary[CellularBatch, Backend] = WeakKeyDictionary()
SENTENCE = st.lists(st.text(min_size=1, max_size=60), max_size=12)


def engine_of(
    config: BilmConfig,
    precision: Precision,
    products: ProductPath | None = None,
    *,
    bilm: Bilm | None = None,
    **room: int,
) -> CellularBatch:
    options = replace(EngineOptions(precision, products=products), **room)  # type: ignore[arg-type]
    made: list[Backend] = []

    def noted(bilm: Bilm, memory: Memory, options: EngineOptions) -> Backend:
        made.append(new_backend(bilm, memory, options))
        return made[-1]

    engine = CellularBatch(bilm or random_bilm(config), torch.device("cpu"), options, noted)
    BACKENDS[engine] = made[0]
    if "prepacked" not in engine.backend:
        pytest.skip(f"without prepacked products only 1e-5 is promised: {engine.backend}")
    return engine


def same_bits(found: EmbeddedSentence, expected: EmbeddedSentence) -> bool:
    pairs = ((found.layers, expected.layers), (found.h, expected.h), (found.c, expected.c))
    return all(torch.equal(a, b) for a, b in pairs)


def random_sentences(engine: CellularBatch, chance: random.Random) -> list[PlainSentence]:
    """Of all lengths, from a small vocabulary, some with a state to continue from."""
    words = [f"{'w' * chance.randrange(9)}{i}" for i in range(70)]
    texts = [chance.choices(words, k=chance.choice((0, 1, 5, 24, 70))) for _ in range(40)]
    states = [engine.run([PlainSentence(["state", str(i)])])[0] for i in range(3)]
    carried = [None, *((state.h.numpy(), state.c.numpy()) for state in states)]
    return [
        PlainSentence(
            text, chance.choice(carried), return_state=chance.random() < 0.4, deferrable=chance.random() < 0.5
        )
        for text in texts
    ]


def run_at_random(
    engine: CellularBatch, sentences: list[PlainSentence], chance: random.Random
) -> list[EngineResult[PlainSentence]]:
    """Let sentences join in any order at any time, with others beside them that leave before they are done."""
    results: dict[PlainSentence, EngineResult[PlainSentence]] = {}
    whole: RecurrentEngine[PlainSentence] = RecurrentEngine(engine, LstmStateCodec(engine.config, "0" * 16))
    waiting, passing = chance.sample(sentences, len(sentences)), list[PlainSentence]()

    def fits(joining: list[PlainSentence]) -> bool:
        need = sum((whole.need(len(sentence.tokens)) for sentence in joining), Capacity(0, 0))
        return (whole.capacity + Capacity(whole.ahead, 0) - whole.used).fits(need)

    while waiting or whole.in_flight:
        joining: list[PlainSentence] = []
        for _ in range(chance.randrange(6)):
            if waiting and fits([*joining, waiting[-1]]):
                joining.append(waiting.pop())
        passenger = PlainSentence([f"p{i}" for i in range(40)])
        if fits([*joining, passenger]) and waiting and chance.random() < 0.3:
            joining.insert(chance.randrange(len(joining) + 1), passenger)
            passing.append(passenger)
        whole.join(joining)
        BACKENDS[engine].block_rows = chance.choice((1, 7, 10_000))  # chunks of one tick, of some, of many
        max_steps = chance.choice((None, 5))
        advanced = whole.advance(leave_out=chance.random() < 0.5, max_steps=max_steps)
        results |= {result.sentence: result for result in advanced}
        gone = [sentence for sentence in passing if chance.random() < 0.5]
        whole.drop(gone)
        passing = [sentence for sentence in passing if sentence not in gone]
    assert whole.used == Capacity(0, 0)
    return [results[sentence] for sentence in sentences]


ROOMS = {
    "as it comes": {"input_cache_mib": 0},
    "one row": {"max_rows": 1},
    "few rows, no cache": {"max_rows": 3, "max_tokens": 150, "token_cache_mib": 0},
    "input projections kept": {"max_rows": 20, "input_cache_mib": 400},
}


WAYS: list[tuple[str, Precision, ProductPath | None]] = [
    *((name, precision, None) for name in CONFIGS for precision in get_args(Precision)),
    # Whatever this machine has; its own path for bfloat16 may be one of these
    ("odd sizes", "float32", ProductPath.PREPACKED_BLOCKS),
    ("odd sizes", "bfloat16", ProductPath.ROUNDED_PREPACKED),
    ("long vectors", "bfloat16", ProductPath.ROUNDED_PREPACKED),
]


@pytest.mark.parametrize("products", [None, ProductPath.PREPACKED_BLOCKS])
def test_more_threads_for_more_words_change_nothing(
    products: ProductPath | None, request: pytest.FixtureRequest
) -> None:
    """The model that ships, whose encoder has the shape at which AMX's sums differ with the number of threads."""
    if products is not None and not has_bfloat16_products():
        pytest.skip("oneDNN has no bfloat16 products here")
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    bilm, chance = load("").bilm, random.Random(1)
    engine = engine_of(bilm.config, "bfloat16", products, bilm=bilm, token_cache_mib=0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 9))) for _ in range(1200)]
    sentences = [PlainSentence(words[first : first + 20]) for first in range(0, len(words), 20)]
    alone = [engine.run([sentence])[0] for sentence in sentences]
    assert all(map(same_bits, engine.run(sentences), alone))


@pytest.mark.parametrize(("name", "precision", "products"), WAYS)
def test_random_schedules(name: str, precision: Precision, products: ProductPath | None) -> None:
    chance = random.Random(5)
    config = CONFIGS[name]
    engine = engine_of(config, precision, products)
    sentences = random_sentences(engine, chance)
    alone = [engine.run([sentence])[0] for sentence in sentences]
    for room in ROOMS.values():
        other = engine_of(config, precision, products, bilm=None, **room)
        for found, expected in zip(run_at_random(other, sentences, chance), alone, strict=True):
            states = () if found.state is None else zip(found.state, (expected.h, expected.c), strict=True)
            assert np.array_equal(found.vectors, expected.layers[:, 1:-1].numpy())
            assert all(np.array_equal(a, b.numpy()) for a, b in states)
        assert other.free_rows == other.max_rows + other.n_waiting
        assert other.free_tokens == other.max_tokens


@settings(max_examples=50)
@given(st.lists(SENTENCE, min_size=1, max_size=8))
def test_any_text(sentences: list[list[str]]) -> None:
    engine = engine_of(SIZES["tiny"], "float32")
    together = engine.run([PlainSentence(tokens) for tokens in sentences])
    for tokens, found in zip(sentences, together, strict=True):
        assert found.layers.shape == (3, len(tokens) + 2 if tokens else 0, 16)
        assert same_bits(found, engine.run([PlainSentence(tokens)])[0])


def test_threads_change_nothing() -> None:
    config = replace(SIZES["tiny"], cell_dim=1024, projection_dim=64)  # wide enough to be shared out
    sentences = [PlainSentence([f"word{i}"] * (i + 1)) for i in range(40)]
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            engine = engine_of(config, "float32")
            assert f"{n_threads} threads" in engine.backend
            found.append(engine.run(sentences))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(others, found[0], strict=True))


@pytest.mark.parametrize(("n_threads", "input_cache_mib"), [(1, 0), (1, 400), (3, 0), (3, 400)])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_kernel_gives_the_bits_of_products(name: str, n_threads: int, input_cache_mib: int) -> None:
    def products_only(bilm: Bilm, memory: Memory, options: EngineOptions) -> Backend:
        return CpuBackend(bilm, memory, 100, options.input_cache_bytes, new_recurrence=lambda *_: None)

    chance, options = random.Random(6), EngineOptions(max_rows=100, input_cache_mib=input_cache_mib)
    engine = engine_of(CONFIGS[name], "float32")
    sentences = [sentence for _ in range(3) for sentence in random_sentences(engine, chance)]  # several groups of rows
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found, expected = (
            CellularBatch(random_bilm(CONFIGS[name]), torch.device("cpu"), options, new)
            for new in (new_backend, products_only)
        )
        assert [each.paths["recurrence"] for each in (found, expected)] == ["one_kernel", "products"]
        assert ("with a helper" in found.backend) == (n_threads > 1)
        alone = sentences[:9]
        results = [[*each.run(sentences), *(each.run([one])[0] for one in alone)] for each in (found, expected)]
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(*pair) for pair in zip(*results, strict=True))
