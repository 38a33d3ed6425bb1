import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from bilm_model.bilm import Bilm, initialize
from bilm_model.weights.loading import load
from bilm_training.learner import Learner
from bilm_training.main import main
from bilm_training.objectives.language_model import BilmObjective
from bilm_training.recipe import Optimisation, Softmax, read_recipe
from bilm_training.runs.checkpoints import read_vocabulary
from bilm_training.runs.run_folder import RunFolder
from bilm_training.trainer import RunWriters

from tests.support.processes import started
from tests.unit.training.training_support import (
    COMMON,
    EPOCH_STEPS,
    RUN,
    TINY,
    ActingLog,
    after_step,
    assert_same,
    checkpoint,
    records,
    resume,
    train,
    write,
)

STEPS = 3 * EPOCH_STEPS
SLOW = pytest.mark.slow
"""Of tests that train a whole run; a quick one of the same kind stands beside each."""


def assert_same_run(uninterrupted: Path) -> None:
    """The run here is as if it had never been interrupted: every number but times, every tensor."""
    other = RunFolder(uninterrupted / "run")
    assert records(RUN.steps) == records(other.steps)
    assert records(RUN.epochs) == records(other.epochs)
    found, expected_model = (load(str(folder.model)) for folder in (RUN, other))
    assert_same(dict(found.bilm.state_dict()), dict(expected_model.bilm.state_dict()))
    assert found.version == expected_model.version
    assert_same(torch.load(RUN.best, weights_only=True), torch.load(other.best, weights_only=True))
    end, expected_end = checkpoint(RUN), checkpoint(other)
    del end["seconds"], expected_end["seconds"]
    assert_same(end, expected_end)


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_sentences_are_learnt_and_served(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("one", "two", "three", "four", "five")
    # a name that TOML would take for a number
    write(here / "2024", "".join(f"sentence number {n} says {n} {n}\n" for n in numbers))
    changes = ("epochs=30", "batch=2", "dropout=0.0", "learning_rate=0.05")
    settings = ("--set=data.typos=0", *(f"--set=optimisation.{change}" for change in changes))
    texts = ("--train", "2024", "--valid", "2024")
    assert main(["run", "recipe.toml", "--out", "run", *texts, *COMMON, *settings]) == 0
    first, *_, last = RUN.read_epochs()
    assert first.valid_mean > 6
    assert last.valid_forward < 3
    assert last.valid_backward < 3
    assert f"{RUN.model}: serve it with  bilm-serve --model {RUN.model}" in capsys.readouterr().out

    bilm = load(str(RUN.model)).bilm
    assert bilm.config == TINY
    assert {name: tuple(p.shape) for name, p in bilm.named_parameters()} == Bilm.parameter_shapes(TINY)
    assert (bilm.encoder.char_cnn.embedding[0] == 0).all()
    best = torch.load(RUN.best, weights_only=True)
    for name, tensor in bilm.state_dict().items():
        assert torch.equal(tensor, best[f"bilm.{name}"])

    assert main(["eval", "run", "--text", "2024", *COMMON]) == 0
    measured = json.loads(RUN.eval.read_text())["perplexity"]["2024"]
    best_mean = min(record.valid_mean for record in RUN.read_epochs())
    assert (measured["forward"] + measured["backward"]) / 2 == pytest.approx(best_mean, rel=1e-6)


def test_a_run_leaves_its_best_model_and_measures_it(
    uninterrupted: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted / "run", "run")
    bilm, best = load(str(RUN.model)).bilm, torch.load(RUN.best, weights_only=True)
    assert bilm.config == TINY
    assert (bilm.encoder.char_cnn.embedding[0] == 0).all()
    for name, tensor in bilm.state_dict().items():
        assert torch.equal(tensor, best[f"bilm.{name}"])
    means = [epoch.valid_mean for epoch in RUN.read_epochs()]
    assert min(means) < means[0]
    assert main(["eval", "run", "--text", "valid", *COMMON]) == 0
    measured = json.loads(RUN.eval.read_text())["perplexity"]["valid"]
    assert (measured["forward"] + measured["backward"]) / 2 == pytest.approx(min(means), rel=1e-6)
    assert "### Perplexity" in capsys.readouterr().out


def test_a_run_says_what_it_does(uninterrupted: Path) -> None:
    folder = RunFolder(uninterrupted / "run")
    steps, epochs = list(folder.read_steps()), list(folder.read_epochs())
    assert [(record.step, record.epoch) for record in steps] == [(n + 1, n // EPOCH_STEPS + 1) for n in range(STEPS)]
    assert [(record.step, record.epoch) for record in epochs] == [(EPOCH_STEPS * n, n) for n in (1, 2, 3)]
    recipe = read_recipe(str(folder.config))
    assert recipe == read_recipe(str(uninterrupted / "recipe.toml"))
    peak, warmup = recipe.optimisation.learning_rate, recipe.optimisation.warmup_steps
    for n, record in enumerate(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (n - warmup) / (STEPS - warmup)))
        assert record.learning_rate == pytest.approx(peak * ((n + 1) / warmup if n < warmup else cosine))
        # both directions, and about as many tokens of each
        assert record.loss == pytest.approx((record.loss_forward + record.loss_backward) / 2, rel=0.03)
        assert record.gradient_norm > 0
    for epoch in epochs:
        mean = sum(step.loss for step in steps if step.epoch == epoch.epoch) / EPOCH_STEPS
        assert epoch.train_loss == pytest.approx(mean, rel=0.02)
    assert checkpoint(folder)["best"] == min(epoch.valid_mean for epoch in epochs)
    assert read_vocabulary(folder).words[0] == "</S>"


@pytest.mark.parametrize(
    ("optimiser", "rate", "schedule", "precision", "softmax"),
    [
        ("adamw", 0.03, "linear", "bfloat16", "adaptive"),
        ("adagrad", 0.1, "constant", "float32", "full"),
        ("sgd", 1.0, "cosine", "bfloat16", "full"),
    ],
)
def test_other_ways_to_learn(  # noqa: PLR0917
    here: Path, optimiser: str, rate: float, schedule: str, precision: str, softmax: str
) -> None:
    changes = {
        "optimiser": optimiser,
        "learning_rate": rate,
        "schedule": schedule,
        "precision": precision,
        "warmup_steps": 2,
        "epochs": 1,
    }
    assert train(f"softmax.kind={softmax}", *(f"optimisation.{key}={value}" for key, value in changes.items())) == 0
    steps = list(RUN.read_steps())
    assert sum(record.loss for record in steps[-5:]) < sum(record.loss for record in steps[:5])
    middle = 2 + (EPOCH_STEPS - 2) // 2
    share = {"linear": 0.5, "constant": 1.0, "cosine": 0.5}[schedule]
    assert [steps[n].learning_rate for n in (0, 1, middle)] == pytest.approx([rate / 2, rate, rate * share])
    assert math.isfinite(next(RUN.read_epochs()).valid_mean)


@pytest.mark.parametrize(
    ("optimiser", "fused_on_gpu"), [("adam", True), ("adamw", True), ("sgd", True), ("adagrad", None)]
)
def test_an_optimiser_is_fused_where_torch_has_it(optimiser: Any, fused_on_gpu: bool | None) -> None:
    def learner(device_type: str) -> Learner:
        bilm = initialize(Bilm(TINY), torch.Generator().manual_seed(1))
        objective = BilmObjective(bilm, 20, Softmax(kind="full"), dropout=0.0)
        chosen = Optimisation(
            optimiser=optimiser, epochs=1, batch=2, steps=3, learning_rate=0.1, gradient_clip=1.0, dropout=0.0
        )
        return Learner(objective, chosen, 10, torch.device(device_type))

    on_cpu, on_gpu = learner("cpu"), learner("cuda")
    assert _fused(on_cpu) is True
    assert _fused(on_gpu) is fused_on_gpu
    on_gpu.load_state_dict(on_cpu.state_dict())  # a run that began on a CPU
    assert _fused(on_gpu) is fused_on_gpu


def _fused(learner: Learner) -> bool | None:
    (group,) = learner.state_dict()["optimiser"]["param_groups"]
    found: bool | None = group["fused"]
    return found


def test_windows_without_anything_to_predict_change_nothing(here: Path) -> None:
    """In the middle of "a\\nb\\n", read step by step, neither direction has anything to predict."""
    write(here / "text", "a\nb\n")
    assert train("data.train=text", "data.valid=text", "optimisation.batch=1", "optimisation.steps=1") == 0
    steps = list(RUN.read_steps())
    assert [record.loss == 0 for record in steps] == [False, False, True, False, False] * 3
    assert math.isnan(steps[2].loss_forward)
    assert all(math.isfinite(record.valid_mean) for record in RUN.read_epochs())


# ---- interrupted and gone on with ------------------------------------------------------------------------------------


# bilm-train that stands still when a step is in the log
HELD_AFTER = """
import sys, threading
from bilm_training.main import main
from bilm_training.runs.run_log import RunLog
from bilm_training.trainer import RunWriters

class HeldLog(RunLog):
    def step(self, record):
        super().step(record)
        if record.step == int(sys.argv[1]):
            print("held", flush=True)
            threading.Event().wait()

main(sys.argv[2:], RunWriters(new_log=HeldLog))
"""


def killed_after(n_steps: int, *arguments: str) -> None:
    """Run bilm-train in a process of its own, and kill it when so many steps are in the log."""
    program = [sys.executable, "-c", HELD_AFTER, str(n_steps), *arguments, *COMMON]
    with Path("errors").open("wb") as errors, started(program, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdout is not None
        assert b"held\n" in process.stdout, Path("errors").read_text()  # after the lines of whole epochs
    assert process.returncode == -signal.SIGKILL
    assert RUN.steps.read_bytes().count(b"\n") == n_steps


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(uninterrupted: Path, here: Path) -> None:
    """Killed in the first epoch and, having gone on, in the second."""
    killed_after(8, "run", "recipe.toml", "--out", "run")
    killed_after(EPOCH_STEPS + 4, "resume", "run")
    assert resume() == 0
    assert_same_run(uninterrupted)


class KilledError(BaseException):
    """Nothing that is ever caught."""


def kill() -> None:
    raise KilledError


def killed_in_checkpoint(number: int) -> RunWriters:
    """While it is being written: half of it is there."""
    seen = 0

    def half(content: dict[str, Any], file: BinaryIO) -> None:
        nonlocal seen
        torch.save(content, file)
        seen += "step" in content
        if seen == number:
            file.truncate(file.tell() // 2)
            shutil.copy(file.name, RUN.path / "left")
            raise KilledError

    return RunWriters(save=half)


@pytest.mark.parametrize(
    ("writers", "last_step"),
    [
        pytest.param(
            RunWriters(new_log=partial(ActingLog, before_epoch=kill)), 12, id="between best and epoch", marks=SLOW
        ),
        pytest.param(killed_in_checkpoint(1), None, id="in the very first checkpoint", marks=SLOW),
        pytest.param(killed_in_checkpoint(3), 6, id="in a checkpoint"),
        pytest.param(killed_in_checkpoint(4), 12, id="in the checkpoint between epochs", marks=SLOW),
    ],
)
def test_a_kill_at_any_moment_is_gone_on_from(
    uninterrupted: Path, here: Path, writers: RunWriters, last_step: int | None
) -> None:
    with pytest.raises(KilledError):
        train(writers=writers)
    assert (checkpoint(RUN)["step"] if RUN.checkpoint.exists() else None) == last_step
    left = here / "run" / "left"
    if left.exists():
        left.rename(here / "run" / "checkpoint.pt.part")  # which a real kill would have left there
    assert resume() == 0
    assert_same_run(uninterrupted)
    assert not list(RUN.path.glob("*.part"))


@pytest.mark.parametrize(
    ("step", "number", "code"),
    [
        pytest.param(10, signal.SIGTERM, 130, id="in an epoch"),
        pytest.param(EPOCH_STEPS, signal.SIGINT, 130, id="between epochs", marks=SLOW),
        pytest.param(STEPS, signal.SIGTERM, 0, id="after the last step", marks=SLOW),
    ],
)
def test_a_stopped_run_goes_on_where_it_was(  # noqa: PLR0917
    uninterrupted: Path,
    here: Path,
    step: int,
    number: signal.Signals,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    assert train(writers=after_step(step, lambda: os.kill(os.getpid(), number))) == code
    assert signal.getsignal(number) is before
    assert checkpoint(RUN)["step"] == step == len(records(RUN.steps))
    if code:
        assert "stopped; go on with  bilm-train resume run\n" in capsys.readouterr().err
    assert resume() == 0
    assert_same_run(uninterrupted)


def test_a_finished_run_stays_as_it_is(uninterrupted: Path, here: Path) -> None:
    shutil.copytree(uninterrupted / "run", "run")
    assert resume() == 0
    assert_same_run(uninterrupted)


@contextmanager
def files_end_after(n_bytes: int) -> Iterator[None]:
    """What a full disk looks like to a program, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_at_the_first_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What there is then can be gone on from: see the kill in the very first checkpoint."""
    with files_end_after(20_000):
        assert train() == 1
    assert "bilm-train: run/checkpoint.pt: File too large\n" in capsys.readouterr().err
    assert sorted(path.name for path in RUN.path.iterdir()) == ["config.toml", "lock", "vocabulary.txt"]


@pytest.mark.parametrize(
    ("step", "full"), [(EPOCH_STEPS + 4, RUN.checkpoint), pytest.param(EPOCH_STEPS - 1, RUN.best, marks=SLOW)]
)
def test_a_full_disk_stops_a_run_that_then_goes_on(
    uninterrupted: Path,
    here: Path,
    step: int,
    full: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept: dict[Path, bytes] = {}

    def fill() -> None:
        kept.update({path: path.read_bytes() for path in (RUN.checkpoint, RUN.best, RUN.model) if path.exists()})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    with files_end_after(resource.RLIM_INFINITY):
        assert train(writers=after_step(step, fill)) == 1
    assert f"bilm-train: {full}: File too large\n" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == kept
    assert RUN.checkpoint in kept
    assert not list(RUN.path.glob("*.part"))
    assert resume() == 0
    assert_same_run(uninterrupted)
