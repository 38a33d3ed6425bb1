"""Cells' kernel for bfloat16 by tile registers, on machines that have them; and where it is used."""

from dataclasses import replace

import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES, BilmConfig
from bilm_model.engine.backend import Memory
from bilm_model.engine.backends import new_backend
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.cpu.fastest import stands_in_for, suits_tiles
from bilm_model.engine.cpu.tiles import has_tiles, paired
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence
from bilm_model.kernels.product_paths import ProductPath

CPU = torch.device("cpu")
CONFIGS = {
    "tiny": SIZES["tiny"],
    "odd sizes": BilmConfig(5, ((1, 7), (2, 9), (3, 17)), projection_dim=13, cell_dim=37, n_highway=2),
    "no projection": replace(SIZES["tiny"], cell_dim=40, projection_dim=40),
    "wide": replace(SIZES["tiny"], cell_dim=200, projection_dim=70, n_layers=3),
}
SENTENCES = [PlainSentence([f"w{i * j % 37}" for j in range(i % 30 + 1)]) for i in range(150)]


def products_only(bilm: Bilm, memory: Memory, options: EngineOptions) -> CpuBackend:
    rows = options.max_rows or 1
    return CpuBackend(bilm, memory, rows, options.input_cache_bytes, new_recurrence=lambda lstm, config: None)


def cosine(found: EmbeddedSentence, expected: EmbeddedSentence) -> float:
    pairs = ((found.layers, expected.layers), (found.h, expected.h), (found.c, expected.c))
    return min(float(torch.cosine_similarity(a.double(), b.double(), dim=-1).min()) for a, b in pairs)


@pytest.fixture
def tiles() -> None:
    if not has_tiles():
        pytest.skip("needs a processor with tiles (amx_bf16)")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_they_give_the_vectors_of_products_and_a_sentence_its_bits(name: str, n_threads: int) -> None:
    config, options = CONFIGS[name], EngineOptions("bfloat16", max_rows=130)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        engine = CellularBatch(random_bilm(config), CPU, options, new_backend)
        if engine.paths["products"].startswith("rounded"):
            pytest.skip(f"needs native bfloat16 products: {engine.backend}")
        assert engine.paths["recurrence"] == "one_kernel"
        assert "in one kernel for tiles" in engine.backend
        found = engine.run(SENTENCES)
        alone = [engine.run([sentence])[0] for sentence in SENTENCES[::10]]
    finally:
        torch.set_num_threads(before)
    exact = CellularBatch(random_bilm(config), CPU, EngineOptions(max_rows=130)).run(SENTENCES)
    assert min(map(cosine, found, exact)) > 0.998
    for one, same in zip(alone, found[::10], strict=True):
        assert all(torch.equal(*pair) for pair in ((one.layers, same.layers), (one.h, same.h), (one.c, same.c)))


def test_without_tiles_products_do_the_work() -> None:
    engine = CellularBatch(random_bilm(SIZES["tiny"]), CPU, EngineOptions("bfloat16"), products_only)
    assert engine.paths["recurrence"] == "products"
    exact = CellularBatch(random_bilm(SIZES["tiny"]), CPU).run(SENTENCES[:20])
    assert min(map(cosine, engine.run(SENTENCES[:20]), exact)) > 0.998


@pytest.mark.parametrize(
    ("products", "float32", "bfloat16"),
    [
        (ProductPath.PREPACKED, True, True),
        (ProductPath.PREPACKED_BLOCKS, False, True),
        (ProductPath.PLAIN, False, False),
        (ProductPath.ROUNDED_PREPACKED, False, False),
    ],
)
def test_which_products_a_kernel_stands_in_for(products: ProductPath, *, float32: bool, bfloat16: bool) -> None:
    assert stands_in_for(products, torch.float32) == float32
    assert stands_in_for(products, torch.bfloat16) == bfloat16


@pytest.mark.parametrize(
    ("size", "cache_mib", "suits"),
    [("small", 300, True), ("small", 2, False), ("medium", 300, False), ("original", 300, False)],
)
def test_tiles_compute_small_cells(size: str, cache_mib: int, *, suits: bool) -> None:
    assert suits_tiles(SIZES[size], cache_mib * 2**20) == suits


@pytest.mark.parametrize(
    "features", ["", "+avx512f,-amx-bf16,-amx-tile", "+avx512f,+amx-tile", "+amx-bf16,+amx-tile,-avx512f"]
)
def test_a_processor_without_all_that_it_takes_has_no_tiles(features: str) -> None:
    assert not has_tiles(features)


def test_pairs_of_components_stand_side_by_side() -> None:
    panels = torch.arange(3 * 64.0).view(1, 3, 64)  # whole numbers below 256 are exact in bfloat16
    found = paired(panels).float()
    assert found.shape == (1, 16, 64, 2)
    assert torch.equal(found[0, 0], panels[0, :2].T)
    assert torch.equal(found[0, 1, :, 0], panels[0, 2])
    assert not found[0, 1, :, 1].any()
    assert not found[0, 2:].any()
