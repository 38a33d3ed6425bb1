"""What is known of a run from its folder: one that has finished, was interrupted, or is still going on."""

import hashlib
import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilm_model.bilm import Bilm
from bilm_model.config import BilmConfig, from_options
from bilm_model.errors import ConfigError
from bilm_system.files import read_text, reason
from safetensors import SafetensorError, safe_open

from bilm_training.errors import RunError
from bilm_training.evaluation.knowledge.report import Knowledge, read_knowledge
from bilm_training.evaluation.knowledge.scores import TreebankReport
from bilm_training.runs.records import EpochRecord
from bilm_training.runs.run_folder import RunFolder


@dataclass(frozen=True)
class FinishedRun:
    """What is known of a run.

    Attributes:
        name: of the folder, with as many of its parents as set it apart from the others.
        folder: the run's.
        student: whether it learnt a teacher's vectors; its metrics on the validation text are no perplexities then,
            see `EpochRecord`.
        config: None before there is a model.
        epochs: those finished.
        n_steps: done.
        seconds: until the last line of the logs.
        tokens_per_s: median over the steps; NaN without any.
        vocabulary: hash of the words; None if they aren't there.
        knowledge: None before `bilm-train eval`.
    """

    name: str
    folder: RunFolder
    student: bool
    config: BilmConfig | None
    epochs: tuple[EpochRecord, ...]
    n_steps: int
    seconds: float
    tokens_per_s: float
    vocabulary: str | None
    knowledge: Knowledge | None

    @property
    def best(self) -> EpochRecord | None:
        """The epoch with the lowest metric on the validation text."""
        finite = [epoch for epoch in self.epochs if math.isfinite(epoch.valid_mean)]
        return min(finite, key=lambda epoch: epoch.valid_mean, default=None)

    @property
    def n_parameters(self) -> int | None:
        """As `Bilm.parameter_count`, without a model; None before there is one."""
        if self.config is None:
            return None
        return sum(math.prod(shape) for shape in Bilm.parameter_shapes(self.config).values()) - self.config.char_dim

    @property
    def treebanks(self) -> tuple[TreebankReport, ...]:
        """Empty before `bilm-train eval` has probed."""
        return self.knowledge.treebanks if self.knowledge else ()


def read_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Read each folder once, in their order.

    Raises:
        RunError: naming every folder that is no run, or what is damaged in one.
    """
    folders: dict[Path, RunFolder] = {}
    errors: dict[str, None] = {}
    for path in paths:
        try:
            folder = RunFolder.of_run(path)
            folders.setdefault(path.resolve(), folder)
        except RunError as error:
            errors[str(error)] = None
    if errors:
        raise RunError("\n".join(errors))
    return [_read(name, folder) for name, folder in zip(_names(list(folders)), folders.values(), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as many as no other path ends in."""
    names = []
    for path in paths:
        n = 1
        while any(other != path and other.parts[-n:] == path.parts[-n:] for other in paths):
            n += 1
        names.append("/".join(path.parts[-n:]))
    return names


def _read(name: str, folder: RunFolder) -> FinishedRun:
    epochs = tuple(folder.read_epochs())
    speeds, n_steps, seconds = [], 0, max((epoch.seconds for epoch in epochs), default=0.0)
    for step in folder.read_steps():
        speeds.append(step.tokens_per_s)
        n_steps, seconds = step.step, max(seconds, step.seconds)
    return FinishedRun(
        name=name,
        folder=folder,
        student=_is_student(folder.config),
        config=_read_config(folder.model) if folder.model.exists() else None,
        epochs=epochs,
        n_steps=n_steps,
        seconds=seconds,
        tokens_per_s=statistics.median(speeds) if speeds else math.nan,
        vocabulary=hashlib.sha256(folder.vocabulary.read_bytes()).hexdigest() if folder.vocabulary.exists() else None,
        knowledge=read_knowledge(folder.eval) if folder.eval.exists() else None,
    )


def _is_student(path: Path) -> bool:
    try:
        return "distillation" in tomllib.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {reason(error)}") from error


def _read_config(path: Path) -> BilmConfig:
    """Of the file's head alone: reading the weights would take long."""
    try:
        with safe_open(path, framework="pt") as file:
            return from_options(json.loads((file.metadata() or {})["options"]))
    except (OSError, SafetensorError, KeyError, ValueError, ConfigError) as error:
        raise RunError(f"{path}: not a model file of this program: {error}") from error
