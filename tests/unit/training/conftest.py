"""Runs of `bilm-train` that several tests look at, each trained once."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.training.training_support import EPOCH_STEPS, after_step, train, write_recipe


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks of these sizes take longest to wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its texts, and its run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train() == 0
    return folder


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stop = after_step(EPOCH_STEPS + 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(writers=stop) == 130
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the same recipe in it."""
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def begun(here: Path, stopped: Path) -> Path:
    """The working directory, with a run that was stopped in its second epoch."""
    shutil.copytree(stopped / "run", here / "run")
    return here
