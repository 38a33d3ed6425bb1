"""What can't be begun or gone on with: said clearly, and nothing is lost."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bilm_model.bilm import Bilm
from bilm_training.data.streams import WindowPair
from bilm_training.data.vocabulary import Vocabulary
from bilm_training.errors import DivergedError, RunError
from bilm_training.learner import Learner
from bilm_training.main import main, new_objective
from bilm_training.recipe import read_recipe
from bilm_training.runs.checkpoints import load_best, read_vocabulary
from bilm_training.runs.run_folder import RunFolder
from torch import Tensor, nn

from tests.unit.training.training_support import (
    COMMON,
    RUN,
    TINY,
    assert_same,
    checkpoint,
    open_text,
    records,
    resume,
    streams_of,
    train,
    write,
    write_recipe,
)


def content() -> dict[str, bytes]:
    """Every file of the run here."""
    return {str(path): path.read_bytes() for path in RUN.path.rglob("*") if path.is_file()}


def assert_says(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = capsys.readouterr().err
    assert re.search(rf"^bilm-train: {message}$", error, re.MULTILINE), error


def flipped(data: bytes, place: int, bit: int = 1) -> bytes:
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def change(how: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(how(path.read_bytes()))


DOES_NOT_FIT = r"run/checkpoint\.pt: doesn't fit the run's configuration and vocabulary: (?s:.*)size mismatch .*"
OTHER = "{}: isn't what the run run began with"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("run/checkpoint.pt", change(lambda data: flipped(data, len(data) // 2)), r"run/checkpoint\.pt: damaged.*"),
        ("run/checkpoint.pt", change(lambda data: data[: len(data) // 2]), r"run/checkpoint\.pt: damaged: .*"),
        ("run/checkpoint.pt", change(lambda data: b""), r"run/checkpoint\.pt: damaged: .*"),
        ("run/checkpoint.pt", Path.unlink, r"run/checkpoint\.pt: missing"),
        ("run/vocabulary.txt", Path.unlink, r"run/vocabulary\.txt: No such file or directory"),
        ("run/vocabulary.txt", change(lambda data: data + b"new\n"), OTHER.format("vocabulary.txt")),
        ("run/vocabulary.txt", change(lambda data: data.replace(b"w0\n", b"v0\n")), OTHER.format("vocabulary.txt")),
        ("run/config.toml", change(lambda data: data.replace(b"cell_dim = 9", b"cell_dim = 8")), DOES_NOT_FIT),
        ("run/config.toml", change(lambda data: data + b"more"), r"run/config\.toml: .*"),
        ("run/config.toml", Path.unlink, r"run: not the folder of a run \(config\.toml is missing\)"),
        ("train", change(lambda data: data.replace(b"w5", b"w0", 1)), OTHER.format("train")),
        ("valid", change(lambda data: data + b"w0\n"), OTHER.format("valid")),
        ("train", Path.unlink, "train: No such file or directory"),
    ],
    ids=range(13),
)
def test_a_run_that_can_not_go_on_says_why_and_stays_as_it_is(
    begun: Path, name: str, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(begun / name)
    before = content()
    assert resume() == 1
    assert_says(message, capsys)
    assert content() == before


def test_a_folder_that_is_none_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume() == 1
    assert_says("run: no such folder", capsys)


def test_a_flipped_byte_is_found_or_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    run, copy = RunFolder(uninterrupted / "run"), RunFolder(tmp_path)
    data, expected = run.best.read_bytes(), torch.load(run.best, weights_only=True)
    objective = new_objective(read_recipe(str(run.config)), read_vocabulary(run), torch.device("cpu"))
    messages = []
    # the archive's directory, which has no checksum, stands at the end
    places = [*range(0, len(data) - 4000, 211), *range(len(data) - 4000, len(data), 17)]
    for n, place in enumerate(places):
        copy.best.write_bytes(flipped(data, place, bit=1 << n % 8))
        try:
            load_best(copy, objective)
        except RunError as error:
            messages.append(str(error))
        else:
            assert_same(dict(cast(nn.Module, objective).state_dict()), dict(expected))
    assert len(messages) > len(places) / 4
    assert all(message.startswith(f"{copy.best}: damaged") for message in messages)


def test_parameters_of_another_vocabulary_are_refused(uninterrupted: Path) -> None:
    run = RunFolder(uninterrupted / "run")
    words = read_vocabulary(run).words
    objective = new_objective(read_recipe(str(run.config)), Vocabulary(words[:-1]), torch.device("cpu"))
    message = r"best\.pt: doesn't fit the run's configuration and vocabulary: (?s:.*)size mismatch"
    with pytest.raises(RunError, match=message):
        load_best(run, objective)


def test_a_run_is_not_written_over(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content()
    assert train() == 1
    assert_says("run: holds a run already; go on with it by  bilm-train resume run", capsys)
    assert content() == before


def test_one_process_at_a_time_trains_into_a_folder(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content()
    with RUN.taken():
        assert resume() == 1
        assert_says("run: another process is training into it", capsys)
    assert content() == before
    assert resume() == 0


def test_a_folder_is_taken_before_anything_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RUN.taken():
        assert train() == 1
        assert_says("run: another process is training into it", capsys)
        assert list(content()) == ["run/lock"]
    assert not RUN.path.exists()


@pytest.mark.parametrize("name", ["train", "valid"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", ": holds no word"),
        (b"\n \n", ": holds no word"),
        (b"w1\nw2\nw3 \xc3(\n", r", line 3: not UTF-8 \(.*"),
        (None, ": No such file or directory"),
    ],
)
def test_a_bad_text_is_named_before_anything_is_written(
    here: Path, name: str, text: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here / name
    if text is None:
        path.unlink()
    else:
        write(path, text)
    assert train() == 1
    assert_says(f"{name}{message}", capsys)
    assert not RUN.path.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimisation.batch=5000"], r"train: \d+ tokens are too few for 5000 streams"),
        (["optimisation.batch"], r"--set optimisation\.batch: expected key=value, like .*"),
        (["seed=x", "optimisation.epochs=0"], r"recipe\.toml: seed: .*\nrecipe\.toml: optimisation\.epochs: .*"),
    ],
)
def test_a_bad_choice_is_named_before_anything_is_written(
    here: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*settings) == 1
    assert_says(message, capsys)
    assert not RUN.path.exists()


@pytest.mark.parametrize("threads", ["0", "-1", "many"])
def test_a_number_of_threads_that_is_none_is_a_usage_error(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["resume", "run", "--threads", threads])
    assert exit_.value.code == 2
    assert "error: argument --threads: " in capsys.readouterr().err


def test_a_preset_that_is_none_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "huge", "--out", "run", *COMMON]) == 1
    assert_says("huge: neither a file nor a preset .*", capsys)


def test_an_unknown_word_in_the_validation_text_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "valid", "w0 unheard\n")
    assert train() == 1
    assert_says(
        "valid: the word 'unheard' is not in the vocabulary, which has no <unk>: .* data.max_words below 40 .*", capsys
    )
    assert not RUN.path.exists()
    assert train("data.max_words=30", "optimisation.epochs=1") == 0


def test_an_unknown_word_in_a_measured_text_is_named(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(begun / "other", "w0 unheard\n")
    before = content()
    assert main(["eval", "run", "--text", "other", *COMMON]) == 1
    assert_says("other: the word 'unheard' is not in the vocabulary, which has no <unk>: .*", capsys)
    assert content() == before


@pytest.mark.parametrize("option", ["text", "treebank", "neighbours"])
def test_two_of_the_same_name_are_refused(begun: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One's figures would silently take the other's place."""
    assert main(["eval", "run", f"--{option}", "a/test", f"--{option}", "b/test", *COMMON]) == 1
    assert_says(f"--{option}: test, test: what is found is kept by name, and so names must differ", capsys)


# ---- divergence ------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_keeps_what_it_had(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("optimiser=sgd", "learning_rate=1e30", "gradient_clip=1e30", "warmup_steps=0")
    message = r"the (loss|gradient's norm) is .*(nan|inf).* in the window at step \d+ of the streams"
    assert train(*(f"optimisation.{change}" for change in changes)) == 1
    assert_says(message, capsys)
    found = checkpoint(RUN)
    assert found["step"] <= len(records(RUN.steps)) < 4
    assert all(torch.isfinite(tensor).all() for tensor in found["objective"].values())
    assert resume() == 1  # it can be gone on with, and comes to the same end
    assert_says(message, capsys)
    again = checkpoint(RUN)
    del found["seconds"], again["seconds"]
    assert_same(again, found)


class Steep(nn.Module):
    """A loss that is a number, with a gradient that isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.bilm = Bilm(TINY)
        self.x = nn.Parameter(torch.zeros(2))

    def zero_state(self, n_streams: int) -> tuple[()]:
        return ()

    def metric(self, mean_loss: float) -> float:
        return mean_loss

    def forward(self, pair: WindowPair, states: Any, bfloat16: Any) -> tuple[Tensor, Tensor, tuple[()]]:
        return self.x.sqrt(), torch.tensor([1, 1]), ()


def test_a_gradient_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    optimisation = read_recipe(str(write_recipe(tmp_path))).optimisation
    objective = Steep()
    learner = Learner(objective, optimisation, 10, torch.device("cpu"))
    (pair,) = streams_of(open_text(tmp_path, "a b\n")).windows()
    with pytest.raises(DivergedError, match="the gradient's norm is inf in the window at step 0"):
        learner.learn(pair, ())
    assert objective.x.tolist() == [0.0, 0.0]
