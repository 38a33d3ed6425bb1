from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.characters import token_ids
from bilm_model.config import BilmConfig
from bilm_model.contexts.packing import Packing
from bilm_model.errors import ConfigError, WeightsError
from bilm_model.weights import single_file
from bilm_model.weights.loading import load
from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams, valid_streams
from bilm_training.data.vocabulary import Vocabulary
from bilm_training.evaluation.perplexity import mean_losses
from bilm_training.objectives.distillation import DistillationObjective, layer_variances, new_distillation
from bilm_training.recipe import Data, Distillation, Optimisation, Recipe, read_recipe, to_toml
from bilm_training.runs.records import StepRecord
from bilm_training.runs.run_folder import RunFolder
from bilm_training.trainer import Trainer
from torch import Tensor

TEACHER = BilmConfig(char_dim=4, filters=((1, 8), (2, 8), (3, 8)), cell_dim=24, projection_dim=12)
STUDENT = BilmConfig(char_dim=4, filters=((1, 8), (2, 8)), cell_dim=16, projection_dim=8)
CPU = torch.device("cpu")
VOCABULARY = Vocabulary(("</S>", "<unk>"))  # nothing of it matters here
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "Zürich", "was", "far", "away", ".")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, size=n)) for n in random.integers(0, 12, size=60)]
    path = tmp_path / "text"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Weights twice as large as usual: what stands before a word shows, and doesn't show for ever."""
    bilm = random_bilm(TEACHER, seed=5)
    path = tmp_path / "teacher.safetensors"
    single_file.write(path, TEACHER, {name: 2 * tensor for name, tensor in bilm.state_dict().items()})
    return path


@pytest.fixture
def recipe(text: Path, teacher: Path) -> Recipe:
    optimisation = Optimisation(
        epochs=2, batch=4, steps=8, learning_rate=0.03, warmup_steps=4, gradient_clip=1.0, dropout=0.0
    )
    return Recipe(
        seed=1,
        data=Data(train=text, valid=text),
        architecture=STUDENT,
        optimisation=optimisation,
        distillation=Distillation(teacher=str(teacher)),
    )


def _changed(recipe: Recipe, architecture: BilmConfig = STUDENT, **distillation: str) -> Recipe:
    assert recipe.distillation is not None
    changed = recipe.distillation.model_copy(update=distillation)
    return recipe.model_copy(update={"architecture": architecture, "distillation": changed})


# ---- the loss --------------------------------------------------------------------------------------------------------


def _read(bilm: Bilm, d: int, tokens: list[str]) -> list[Tensor]:
    """A direction's layers of one stream read as one sentence, (T, P) each, by the reference network in float64."""
    x = bilm.encoder(torch.from_numpy(np.stack([token_ids(token) for token in tokens])).long())
    h, c = bilm.zero_state(1).h[:, d], bilm.zero_state(1).c[:, d]
    # As the forward direction, as the tokens stand in reading order
    outputs, *_ = bilm.directions[d](x, Packing.of([len(tokens)], CPU), h, c)
    return [x, *outputs]


def _streams(path: Path, n_streams: int, n_steps: int) -> Iterator[tuple[int, list[str]]]:
    """The direction and the tokens of each stream, cut from the text without the corpus's help."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tokens = [token for line in lines for token in ("<S>", *line.split(), "</S>")]
    length = (len(tokens) - 1) // n_streams
    for d, reading in enumerate((tokens, tokens[::-1])):
        for first in range(0, n_streams * length, length):
            yield d, reading[first : first + min(length, n_steps)]


def test_the_loss_is_the_unexplained_share_in_float64(recipe: Recipe, text: Path) -> None:
    """Two windows with the state carried on, against whole sentences of the same steps."""
    objective = new_distillation(recipe, VOCABULARY, CPU).double().requires_grad_(False)
    teacher = load(recipe.distillation.teacher).bilm.double()  # type: ignore[union-attr]
    objective.teacher.bilm.double()
    windows = Streams(Corpus.open(text), VOCABULARY, 4, 8).windows()
    states = objective.zero_state(4)
    found = torch.zeros(2, dtype=torch.float64)
    for _ in range(2):
        sums, counts, states = objective(next(windows), states)
        assert counts.tolist() == [32, 32]  # boundaries, too
        found += sums
    expected = np.zeros(2)
    for d, tokens in _streams(text, 4, 16):
        layers = zip(_read(objective.bilm, d, tokens), _read(teacher, d, tokens), strict=True)
        for k, (x, y) in enumerate(layers):
            weight, bias = (p.numpy() for p in objective.maps[d][k].parameters())  # type: ignore[index]
            errors = x.numpy() @ weight.T + bias - y.numpy()
            expected[d] += (errors**2).sum() / float(objective.variances[d, k]) / 3
    assert found.numpy() == pytest.approx(expected, rel=1e-9)


def test_variances_are_those_of_the_text(recipe: Recipe, text: Path) -> None:
    teacher = load(recipe.distillation.teacher).bilm.double()  # type: ignore[union-attr]
    found = layer_variances(teacher, Streams(Corpus.open(text), VOCABULARY, 3, 8))
    read: list[list[Tensor]] = [[], []]
    for d, tokens in _streams(text, 3, 10_000):
        read[d].append(torch.stack(_read(teacher, d, tokens)))  # (L, T, P)
    for d in range(2):
        x = torch.cat(read[d], dim=1)
        expected = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=-1).mean(dim=1)
        torch.testing.assert_close(found[d], expected, rtol=1e-9, atol=0)


def test_a_student_that_says_the_mean_explains_nothing(recipe: Recipe, text: Path) -> None:
    """On the text that the variances are from: a share of 1, exactly."""
    objective = new_distillation(recipe, VOCABULARY, CPU)
    streams = valid_streams(Corpus.open(text), VOCABULARY)
    layers = [
        _read(objective.teacher.bilm, d, tokens) for d, tokens in _streams(text, streams.n_streams, streams.length)
    ]
    for maps, outputs in zip(objective.maps, layers, strict=True):  # a short text is one stream
        for linear, y in zip(maps, outputs, strict=True):  # type: ignore[call-overload]
            linear.weight.data.zero_()
            linear.bias.data.copy_(y.mean(dim=0))
    forward, backward, n_tokens = mean_losses(objective, streams)
    assert (forward, backward) == pytest.approx((1.0, 1.0), rel=1e-5)
    assert n_tokens == streams.length
    assert objective.metric(0.25) == 0.25


def test_the_teacher_itself_leaves_nothing_unexplained(recipe: Recipe, text: Path) -> None:
    objective = new_distillation(_changed(recipe, TEACHER, map="identity"), VOCABULARY, CPU)
    streams = valid_streams(Corpus.open(text), VOCABULARY)
    assert min(mean_losses(objective, streams)[:2]) > 0.1
    objective.bilm.load_state_dict(objective.teacher.bilm.state_dict())
    assert mean_losses(objective, streams)[:2] == (0.0, 0.0)


# ---- learning --------------------------------------------------------------------------------------------------------


def _started(recipe: Recipe, run: RunFolder) -> tuple[Trainer, DistillationObjective]:
    made: list[DistillationObjective] = []

    def remembered(recipe: Recipe, vocabulary: Vocabulary, device: torch.device) -> DistillationObjective:
        made.append(new_distillation(recipe, vocabulary, device))
        return made[-1]

    run.path.mkdir()
    return Trainer.start(recipe, run, remembered, CPU), made[0]


def _trained(recipe: Recipe, run: RunFolder) -> list[StepRecord]:
    run.path.mkdir()
    assert Trainer.start(recipe, run, new_distillation, CPU).run()
    return list(run.read_steps())


def _stopped(recipe: Recipe, run: RunFolder, n_steps: int) -> None:
    """Runs so many steps, fewer than an epoch has, and ends as after a signal."""
    trainer, objective = _started(recipe, run)
    steps = count(1)

    def after_a_window(*_: object) -> None:
        trainer.stop = next(steps) == n_steps

    objective.register_forward_hook(after_a_window)
    assert not trainer.run()


@pytest.mark.slow
@pytest.mark.parametrize(("maps", "precision"), [("linear", "float32"), ("identity", "bfloat16")])
def test_training_lowers_the_share(recipe: Recipe, tmp_path: Path, maps: str, precision: str) -> None:
    structure = replace(STUDENT, projection_dim=TEACHER.projection_dim)
    changed = _changed(recipe, structure, map=maps)
    optimisation = changed.optimisation.model_copy(update={"epochs": 5, "precision": precision})
    run = RunFolder(tmp_path / "run")
    steps = _trained(changed.model_copy(update={"optimisation": optimisation}), run)
    first, last = (float(np.mean([step.loss for step in part])) for part in (steps[:3], steps[-10:]))
    assert last < 0.6 * first
    assert last < 0.7
    (*_, epoch) = run.read_epochs()
    assert epoch.valid_mean == pytest.approx(last, rel=0.2)  # a share as it is, no perplexity
    assert load(str(run.model)).bilm.config == structure


def test_the_teacher_is_neither_trained_nor_saved(recipe: Recipe, tmp_path: Path) -> None:
    before = load(recipe.distillation.teacher).bilm.state_dict()  # type: ignore[union-attr]
    run = RunFolder(tmp_path / "run")
    trainer, objective = _started(recipe, run)
    assert trainer.run()
    losses = [step.loss for step in run.read_steps()]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])  # and the student learns
    after = objective.teacher.bilm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    teachers = {tensor.data_ptr() for tensor in after.values()}
    assert not teachers & {parameter.data_ptr() for parameter in objective.parameters()}
    assert {name.partition(".")[0] for name in objective.state_dict()} == {
        "bilm", "maps", "variances", "_extra_state",
    }  # fmt: skip
    assert objective.get_extra_state() == {"teacher": objective.teacher.version}


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_losses(recipe: Recipe, tmp_path: Path) -> None:
    optimisation = recipe.optimisation.model_copy(update={"dropout": 0.1})
    recipe = recipe.model_copy(update={"optimisation": optimisation})
    expected = _trained(recipe, RunFolder(tmp_path / "whole"))
    run = RunFolder(tmp_path / "stopped")
    _stopped(recipe, run, len(expected) // 2 - 3)
    assert Trainer.resume(run, new_distillation, CPU).run()
    found = [(step.step, step.loss, step.gradient_norm) for step in run.read_steps()]
    assert found == [(step.step, step.loss, step.gradient_norm) for step in expected]


def test_another_teacher_is_noticed(recipe: Recipe, tmp_path: Path, teacher: Path) -> None:
    run = RunFolder(tmp_path / "run")
    _stopped(recipe, run, 2)
    single_file.write(teacher, TEACHER, random_bilm(TEACHER, seed=6).state_dict())
    with pytest.raises(WeightsError, match="the teacher teacher is not the one"):
        Trainer.resume(run, new_distillation, CPU)


# ---- what can't be -----------------------------------------------------------------------------------------------


def test_teacher_and_student_need_as_many_layers(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"n_layers: expected 2, as the teacher teacher has, found 3"):
        new_distillation(_changed(recipe, replace(STUDENT, n_layers=3)), VOCABULARY, CPU)


def test_the_identity_needs_the_same_width(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"projection_dim: expected 12, as the teacher teacher has, found 8"):
        new_distillation(_changed(recipe, map="identity"), VOCABULARY, CPU)


def test_a_teacher_that_is_not_there(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        new_distillation(_changed(recipe, teacher=str(tmp_path / "nobody")), VOCABULARY, CPU)
    with pytest.raises(ConfigError, match=r"distillation\.teacher: missing"):
        new_distillation(recipe.model_copy(update={"distillation": None}), VOCABULARY, CPU)


def test_a_teacher_that_knows_nothing(recipe: Recipe, teacher: Path) -> None:
    nothing = {name: torch.zeros_like(tensor) for name, tensor in random_bilm(TEACHER).state_dict().items()}
    single_file.write(teacher, TEACHER, nothing)
    with pytest.raises(WeightsError, match="don't tell tokens apart"):
        new_distillation(recipe, VOCABULARY, CPU)


def test_the_recipe_of_a_distillation(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert read_recipe(str(path)) == recipe
    assert read_recipe(str(path), ["distillation.map=identity"]).distillation.map == "identity"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"distillation\.map"):
        read_recipe(str(path), ["distillation.map=quadratic"])
