"""Token vectors by groups of about one length: against the reference, and the same bits in any group."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.characters import bytes_ids
from bilm_model.config import BilmConfig
from bilm_model.engine.cpu.fused_elementwise import FusedElementwise
from bilm_model.engine.encoder import Blocks, WindowEncoder, blocks_of, groups
from bilm_model.kernels.elementwise import TorchElementwise
from bilm_model.kernels.product_paths import cpu_path
from bilm_model.kernels.products import PlainProduct

from tests.support.slow_transfers import Counting

CONFIG = BilmConfig(char_dim=4, filters=((1, 6), (3, 10), (7, 8)), projection_dim=12, cell_dim=40)
CONFIGS = {
    "as published": CONFIG,
    "widest filter": replace(CONFIG, filters=((50, 5), (1, 3))),
    "one character": replace(CONFIG, filters=((1, 12),), n_highway=0),
    "tanh": replace(CONFIG, activation="tanh", n_highway=2),
}
MARKS = 2
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def words() -> list[bytes]:
    """Three tokens of each length in a random order, and the boundaries."""
    random = np.random.default_rng(3)
    tokens = [random.integers(0, 256, n, dtype=np.uint8).tobytes() for n in range(1, 49) for _ in range(3)]
    tokens += [b"<S>", b"</S>"]
    return [tokens[i] for i in random.permutation(len(tokens))]


IDS = bytes_ids(words())


def noisy_bilm(config: BilmConfig) -> Bilm:
    """Return random weights with biases, which `random_bilm` leaves at 0."""
    bilm, generator = random_bilm(config), torch.Generator().manual_seed(7)
    for parameter in bilm.encoder.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bilm


def fused_encoder(bilm: Bilm) -> WindowEncoder:
    dtype = bilm.product_dtype
    return WindowEncoder(bilm.encoder, bilm.config, cpu_path(dtype).new_product, FusedElementwise(dtype))


@pytest.mark.parametrize("kind", ["fused", "torch", "as on a GPU"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_agrees_with_the_reference(config: BilmConfig, kind: str) -> None:
    bilm = noisy_bilm(config)
    expected = bilm.encoder(torch.from_numpy(IDS).long())
    if kind == "fused":
        encoder = fused_encoder(bilm)
    else:
        blocks = blocks_of(GPU if kind == "as on a GPU" else CPU, config.n_filters)
        encoder = WindowEncoder(bilm.encoder, config, PlainProduct, TorchElementwise(), blocks)
    assert torch.allclose(encoder(IDS), expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_bits_do_not_depend_on_what_else_is_encoded(precision: str) -> None:
    bilm = noisy_bilm(CONFIG)
    if precision == "bfloat16":
        bilm.to_bfloat16_products()
    if not cpu_path(bilm.product_dtype).steady:
        pytest.skip("needs prepacked products")
    encoder, random = fused_encoder(bilm), np.random.default_rng(0)
    expected = encoder(IDS)
    for n_tokens in (1, 1, 2, 3, 5, 9, 17, 40, 100):
        chosen = random.choice(len(IDS), n_tokens, replace=False)
        assert torch.equal(encoder(IDS[chosen]), expected[chosen])
    many = random.permutation(np.repeat(np.arange(len(IDS)), 8))  # more than a block, and groups of one length
    assert torch.equal(encoder(IDS[many]), expected[many])


@pytest.mark.parametrize("n_tokens", [1, 2, 30, 700])
@pytest.mark.parametrize("n_windows", [1, 64, 512])
def test_groups_hold_all_tokens_and_little_else(n_tokens: int, n_windows: int) -> None:
    n_characters = np.sort(np.random.default_rng(n_tokens).integers(1, 49, n_tokens) + MARKS)[::-1]
    found = list(groups(n_characters, Blocks(n_windows, 64, 512)))
    assert [i for group in found for i in range(group.start, group.stop)] == list(range(n_tokens))
    for group in found:
        each = n_characters[group]
        assert len(each) == 1 or len(each) * each[0] <= n_windows
        assert (each[0] - each).sum() <= 64


def test_tokens_of_one_length_are_one_group_of_a_full_product() -> None:
    assert [len(range(g.start, g.stop)) for g in groups(np.full(150, 8), blocks_of(CPU, 2048))] == [64, 64, 22]


def test_blocks_on_a_gpu_are_bounded_by_memory() -> None:
    assert blocks_of(GPU, 2048) == (32_768, 16_384, 16_384)
    assert blocks_of(GPU, 10**9).windows == 2 * 50


def test_on_a_gpu_words_of_all_lengths_are_few_operators() -> None:
    """As many for a word of each length as for all of them eight times."""
    bilm = noisy_bilm(CONFIG)
    encoder = WindowEncoder(bilm.encoder, CONFIG, PlainProduct, TorchElementwise(), blocks_of(GPU, CONFIG.n_filters))
    counted = []
    for ids in (IDS, np.repeat(IDS, 8, axis=0)):
        with Counting() as counting:
            encoder(ids)
        counted.append(counting.operators)
    assert counted[0] == counted[1]
    assert counted[0]["aten.index_select.default"] == 1  # one group
