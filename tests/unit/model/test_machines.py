"""Machines without bfloat16 products, which no product of such factors may reach."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bilm_model.affine import Affine, convolve
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.characters import character_ids, with_boundaries
from bilm_model.config import SIZES, BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.backend import Memory
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import PlainSentence
from bilm_model.kernels.product_paths import ProductPath
from bilm_model.weights import single_file
from bilm_training.errors import RunError
from bilm_training.main import new_objective
from bilm_training.network.mixed_precision import bfloat16_products
from bilm_training.recipe import PRESETS, Recipe, read_recipe
from bilm_training.runs.run_folder import RunFolder
from bilm_training.trainer import Trainer
from torch import Tensor

from tests.unit.model.machine_support import NoBfloat16Products, needs_bfloat16
from tests.unit.training.training_support import TINY, checkpoint, random_text, write, write_recipe

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
    assert set(engine.paths) == {"products", "elementwise", "recurrence"}


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


def test_the_engine_works_without_the_kernel_for_few_rows(caplog: pytest.LogCaptureFixture) -> None:
    expected = layers(None, "float32")

    def unavailable(lstm: ClippedProjectedLstm, config: BilmConfig) -> None:
        raise ImportError("no Numba, simulated")

    def new_backend(bilm: Bilm, memory: Memory, options: EngineOptions) -> CpuBackend:
        return CpuBackend(bilm, memory, 4, options.input_cache_bytes, new_recurrence=unavailable)

    engine = CellularBatch(random_bilm(SIZES["tiny"]), CPU, EngineOptions(max_rows=4), new_backend)
    assert engine.paths["recurrence"] == "products"
    assert "one kernel for few rows unavailable" in caplog.text
    assert torch.equal(engine.run([PlainSentence(TOKENS)])[0].layers, expected)


# ---- training --------------------------------------------------------------------------------------------------------


def passes(path: ProductPath) -> list[Tensor]:
    """What a product and a convolution give under mixed precision, and their gradients."""
    generator = torch.Generator().manual_seed(1)
    affine = Affine(24, 40)
    kernel = torch.randn(6, 3, 4, generator=generator).requires_grad_()
    x, characters = torch.randn(7, 24, generator=generator), torch.randn(5, 3, 9, generator=generator)
    x.requires_grad_()
    with torch.no_grad():
        for parameter in affine.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with bfloat16_products("cpu", path):
        y, z = affine(x), convolve(characters, kernel)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.autograd.backward(y.float().square().sum() + z.float().square().sum())
    found = [y, z, x.grad, kernel.grad, affine.weight.grad, affine.bias.grad if affine.bias is not None else None]
    return [tensor.detach().float() for tensor in found if tensor is not None]


def test_mixed_precision_rounds_as_autocast_does() -> None:
    needs_bfloat16()
    with NoBfloat16Products():
        rounded = passes(ProductPath.ROUNDED_PLAIN)
    for found, expected in zip(rounded, passes(ProductPath.PLAIN), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 2**-8


def test_mixed_precision_exempts_what_autocast_exempts() -> None:
    affine = Affine(4, 3)
    with bfloat16_products("cpu", ProductPath.ROUNDED_PLAIN), torch.autocast("cpu", enabled=False):
        assert affine(torch.ones(2, 4)).dtype == torch.float32


def preset(name: str, folder: Path) -> Recipe:
    """A preset of a network that is small enough for a test."""
    write(folder / "train", random_text(12, seed=1))
    write(folder / "valid", random_text(4, seed=2))
    sizes = ["char_dim=3", "filters=[[1,4],[2,5],[3,6]]", "projection_dim=6", "cell_dim=9", "n_layers=2"]
    changes = [
        *(f"architecture.{size}" for size in sizes),
        f'data.train="{folder / "train"}"',
        f'data.valid="{folder / "valid"}"',
        "softmax.cutoffs=[8, 20]",
        "data.max_words=20",
        "optimisation.epochs=1",
        "optimisation.batch=4",
        "optimisation.steps=8",
    ]
    if name == "student":
        single_file.write(folder / "teacher.safetensors", TINY, random_bilm(TINY).state_dict())
        changes.append(f'distillation.teacher="{folder / "teacher.safetensors"}"')
    return read_recipe(name, changes)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name: str, tmp_path: Path) -> None:
    recipe, folder = preset(name, tmp_path), RunFolder(tmp_path / "run")
    assert recipe.optimisation.precision == "bfloat16"
    with folder.taken():
        trainer = Trainer.start(recipe, folder, new_objective, CPU, ProductPath.ROUNDED_PLAIN)
        with NoBfloat16Products():
            assert trainer.run()
    assert folder.model.exists()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return read_recipe(str(write_recipe(tmp_path)), ["optimisation.precision=auto", "optimisation.epochs=1"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """An empty folder that is taken, named relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("run"))
    with folder.taken():
        yield folder


@pytest.mark.parametrize(("path", "expected"), [(ProductPath.PLAIN, "bfloat16"), (ROUNDED[1], "float32")])
def test_auto_is_written_down_as_what_it_stands_for(
    recipe: Recipe, run: RunFolder, path: ProductPath, expected: str
) -> None:
    trainer = Trainer.start(recipe, run, new_objective, CPU, path)
    assert trainer.products is (path if expected == "bfloat16" else None)
    assert read_recipe(str(run.config)).optimisation.precision == expected


@pytest.fixture
def stopped(recipe: Recipe, run: RunFolder) -> RunFolder:
    """A run in float32, by "auto" on a machine without bfloat16, that has written its first checkpoint."""
    trainer = Trainer.start(recipe, run, new_objective, CPU, ROUNDED[1])
    trainer.stop = True
    assert not trainer.run()
    return run


def test_a_run_is_not_resumed_in_another_precision(stopped: RunFolder) -> None:
    assert checkpoint(stopped)["precision"] == "float32"
    config = stopped.config.read_text(encoding="utf-8")
    stopped.config.write_text(config.replace('"float32"', '"bfloat16"'), encoding="utf-8")
    expected = r"run/config\.toml: optimisation\.precision: expected float32, which the run began with, found bfloat16"
    with pytest.raises(RunError, match=expected):
        Trainer.resume(stopped, new_objective, CPU, ROUNDED[1])


def test_a_checkpoint_that_does_not_say_its_precision_is_of_its_configuration(stopped: RunFolder) -> None:
    """As versions up to 0.1.0 wrote it."""
    content = checkpoint(stopped)
    del content["precision"]
    torch.save(content, stopped.checkpoint)
    assert Trainer.resume(stopped, new_objective, CPU, ROUNDED[1]).products is None
