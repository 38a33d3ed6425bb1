"""Machines without bfloat16 products, which no product of such factors may reach."""

from pathlib import Path

import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.characters import character_ids, with_boundaries
from bilm_model.config import SIZES, BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.backend import Memory
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.cpu.fastest import last_level_cache_bytes, suits_panels
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import PlainSentence
from bilm_model.kernels.product_paths import ProductPath
from torch import Tensor

from tests.unit.model.machine_support import NoBfloat16Products, NoFloat32Products, needs_bfloat16

CPU = torch.device("cpu")
ROUNDED = [ProductPath.ROUNDED_PREPACKED, ProductPath.ROUNDED_PLAIN]
TOKENS = ["a", "sentence", "of", "words"]


def layers(products: ProductPath | None, precision: str = "bfloat16") -> Tensor:
    options = EngineOptions("bfloat16" if precision == "bfloat16" else "float32", products=products)
    return CellularBatch(random_bilm(SIZES["tiny"]), CPU, options).run([PlainSentence(TOKENS)])[0].layers


def test_a_product_that_such_a_machine_lacks_is_noticed() -> None:
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    with NoBfloat16Products(), pytest.raises(RuntimeError, match="needs the cpu support"):
        x @ x


@pytest.mark.parametrize("products", ROUNDED)
def test_the_engine_computes_in_bfloat16(products: ProductPath) -> None:
    with NoBfloat16Products():
        found = layers(products)
    exact = layers(None, "float32")
    assert torch.cosine_similarity(found, exact, dim=-1).min() > 0.999
    assert not torch.equal(found, exact)


def test_the_engine_names_its_paths() -> None:
    engine = CellularBatch(random_bilm(SIZES["tiny"]), CPU, EngineOptions("bfloat16", products=ROUNDED[0]))
    assert "prepacked oneDNN products in float32 of factors rounded to bfloat16" in engine.backend
    assert engine.paths["products"] == "rounded_prepacked"
    assert engine.paths["recurrence"] == "products"
    assert set(engine.paths) == {"products", "elementwise", "recurrence", "planner"}


def test_rounded_factors_give_the_vectors_of_native_products() -> None:
    needs_bfloat16()
    rounded, native = layers(ROUNDED[0]), layers(ProductPath.PREPACKED)
    exact = layers(None, "float32")
    assert float((rounded - native).norm()) < 0.5 * float((rounded - exact).norm())


def test_the_reference_network_computes_in_bfloat16() -> None:
    ids = torch.from_numpy(character_ids(with_boundaries(TOKENS))).long()
    exact, _ = random_bilm(SIZES["tiny"])(ids, [len(ids)])
    bilm: Bilm = random_bilm(SIZES["tiny"]).to_bfloat16_products()
    with NoBfloat16Products():
        found, _ = bilm(ids, [len(ids)])
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, exact, dim=-1).min() > 0.999
    assert not torch.equal(found, exact)


def test_the_engine_works_without_the_kernel_for_all_ticks(caplog: pytest.LogCaptureFixture) -> None:
    expected = layers(None, "float32")

    def unavailable(lstm: ClippedProjectedLstm, config: BilmConfig) -> None:
        raise ImportError("no Numba, simulated")

    def new_backend(bilm: Bilm, memory: Memory, options: EngineOptions) -> CpuBackend:
        return CpuBackend(bilm, memory, 4, options.input_cache_bytes, new_recurrence=unavailable)

    engine = CellularBatch(random_bilm(SIZES["tiny"]), CPU, EngineOptions(max_rows=4), new_backend)
    assert engine.paths["recurrence"] == "products"
    assert "one kernel for all ticks unavailable" in caplog.text
    assert torch.equal(engine.run([PlainSentence(TOKENS)])[0].layers, expected)


@pytest.mark.parametrize("input_cache_mib", [0, 128])
def test_known_words_are_computed_by_the_kernel_for_all_ticks_alone(input_cache_mib: int) -> None:
    engine = CellularBatch(random_bilm(SIZES["tiny"]), CPU, EngineOptions(input_cache_mib=input_cache_mib))
    if engine.paths["recurrence"] != "one_kernel":
        pytest.skip(f"needs the kernel for all ticks: {engine.backend}")
    sentence = PlainSentence(TOKENS)
    with NoFloat32Products(), pytest.raises(RuntimeError, match="expected no product"):
        engine.run([sentence])  # whose words are new
    engine.warm_up()
    (expected,) = engine.run([sentence])
    with NoFloat32Products():
        (found,) = engine.run([sentence])
    assert torch.equal(found.layers, expected.layers)


@pytest.mark.parametrize(
    ("size", "cache_mib", "fits"),
    [("small", 16, True), ("medium", 16, False), ("medium", 32, True), ("medium", 300, True), ("original", 300, False)],
)
def test_cells_run_in_one_kernel_where_they_fit_the_cache(size: str, cache_mib: int, fits: bool) -> None:
    assert suits_panels(SIZES[size], cache_mib * 2**20) == fits


def test_the_last_level_cache_is_found(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20
    assert last_level_cache_bytes(tmp_path / "missing") == 16 * 2**20
