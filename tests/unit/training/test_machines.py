"""Training on machines without bfloat16 products, which no product of such factors may reach."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bilm_model.affine import Affine, convolve
from bilm_model.bilm import random_bilm
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
