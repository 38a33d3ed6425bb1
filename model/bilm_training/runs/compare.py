"""Runs side by side: `bilm-train compare`."""

import hashlib
import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from bilm_model.bilm import Bilm
from bilm_model.config import BilmConfig, from_options
from bilm_model.errors import ConfigError
from bilm_system.files import read_text, reason, write_bytes, write_text
from safetensors import SafetensorError, safe_open

from bilm_training.evaluation.knowledge.report import Knowledge, read_knowledge
from bilm_training.evaluation.knowledge.scores import TreebankReport, best
from bilm_training.runs.run_folder import EpochRecord, RunError, RunFolder

PAGE = "compare.md"
_NOTHING = "–"

Table = list[list[str]]  # the first row is the head


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        name: of the folder, with as many of its parents as set it apart from the others.
        folder: the run's.
        student: whether it learnt a teacher's vectors; its figures on the validation text are no perplexities then,
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
        """The epoch with the lowest figure on the validation text."""
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


def compare(runs: Sequence[Path], out: Path | None = None) -> str:
    """Tables of runs for a terminal; with `out`, also as compare.md in that folder, with plots beside it.

    A run may still be going on or have been interrupted; what it doesn't have yet is left blank.

    Raises:
        RunError: naming every folder that is no run, or what is damaged in one.
        OSError: if something can't be written.
    """
    found = read_runs(runs)
    tables, notes = _tables(found), _notes(found)
    parts = [*map(_plain, tables), "\n".join(notes)]
    if out is not None:
        parts.append(f"written to {_write(found, tables, notes, out)}")
    return "\n\n".join(part for part in parts if part)


# ---- reading ------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads each folder once, in their order.

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
    """The last parts of each path, as many as no other path ends in."""
    names = []
    for path in paths:
        n = 1
        while any(other != path and other.parts[-n:] == path.parts[-n:] for other in paths):
            n += 1
        names.append("/".join(path.parts[-n:]))
    return names


def _read(name: str, folder: RunFolder) -> Run:
    epochs = tuple(folder.read_epochs())
    speeds, n_steps, seconds = [], 0, max((epoch.seconds for epoch in epochs), default=0.0)
    for step in folder.read_steps():
        speeds.append(step.tokens_per_s)
        n_steps, seconds = step.step, max(seconds, step.seconds)
    return Run(
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


# ---- tables -------------------------------------------------------------------------------------------------------


def _tables(runs: Sequence[Run]) -> list[Table]:
    learners, students = _by_kind(runs)
    tables = [_learners_table(learners)] if learners else []
    if students:
        tables.append(_students_table(students))
    if any(run.treebanks for run in runs):
        tables.append(_probes_table(runs))
    return tables


def _by_kind(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Those that learnt words, and those that learnt a teacher's vectors."""
    return [run for run in runs if not run.student], [run for run in runs if run.student]


def _learners_table(runs: Sequence[Run]) -> Table:
    texts = list(dict.fromkeys(text for run in runs for text in _tested(run))) or [("test", 0)]
    names = [name for name, _ in texts]
    # Texts of one name may be different ones
    columns = [f"{name}, {n_tokens:,} tokens" if names.count(name) > 1 else name for name, n_tokens in texts]
    head = [*_RUN_HEAD, "valid fwd", "valid bwd", "valid mean", *columns]
    rows = [
        [*_run_cells(run), *_valid_cells(run), *(_number(_tested(run).get(text, math.nan), 1) for text in texts)]
        for run in runs
    ]
    return [head, *rows]


def _students_table(runs: Sequence[Run]) -> Table:
    head = [*_RUN_HEAD, "unexplained fwd %", "unexplained bwd %", "unexplained mean %"]
    return [head, *([*_run_cells(run), *_valid_cells(run, 100)] for run in runs)]


_RUN_HEAD = ["run", "size", "residual", "steps", "epochs", "best", "minutes", "tokens/s"]


def _run_cells(run: Run) -> list[str]:
    return [
        run.name,
        f"{run.n_parameters / 1e6:.1f} M" if run.n_parameters else _NOTHING,
        run.config.residual if run.config else _NOTHING,
        f"{run.n_steps:,}",
        str(max((epoch.epoch for epoch in run.epochs), default=0)),
        str(run.best.epoch) if run.best else _NOTHING,
        f"{run.seconds / 60:,.1f}",
        _number(run.tokens_per_s, 0),
    ]


def _valid_cells(run: Run, factor: int = 1) -> list[str]:
    top = run.best
    figures = (top.valid_forward, top.valid_backward, top.valid_mean) if top else (math.nan,) * 3
    return [_number(factor * figure, 1) for figure in figures]


def _tested(run: Run) -> dict[tuple[str, int], float]:
    """The mean perplexity on each text, by its name and number of tokens."""
    found = run.knowledge.perplexity if run.knowledge else {}
    return {(name, measured.tokens): measured.mean for name, measured in found.items()}


def _probes_table(runs: Sequence[Run]) -> Table:
    head = ["run", "treebank", "best layer", "POS %", "with typos %", "typo loss", "random %", "word identity %"]
    rows = [_probe_row(run.name, probe) for run in runs for probe in run.treebanks]
    blank = [[run.name] + [_NOTHING] * (len(head) - 1) for run in runs if not run.treebanks]
    return [head, *rows, *blank]


def _probe_row(name: str, report: TreebankReport) -> list[str]:
    top = best(report.model)
    shares = (top.accuracy, top.accuracy_with_typos, top.loss / 100, best(report.random).accuracy)
    percent = [_number(100 * share, 1) for share in (*shares, report.word_identity.accuracy)]
    return [name, report.name, str(top.layer), *percent]


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else _NOTHING


def _notes(runs: Sequence[Run]) -> list[str]:
    learners, students = _by_kind(runs)
    notes = ["best: the epoch with the lowest figure on the validation text"]
    if learners:
        notes.append("valid: perplexities after the best epoch")
    if any(map(_tested, learners)):
        notes.append("under a text's name: its perplexity, mean of both directions")
    if students:
        notes.append("unexplained: the share of its teacher's variance that a student doesn't explain")
    if len({run.vocabulary for run in learners} - {None}) > 1:
        notes.append("The vocabularies differ: perplexities over different words can't be compared.")
    notes += [f"{run.name}: no epoch finished yet" for run in runs if not run.epochs]
    unmeasured = [run for run in runs if run.epochs and run.knowledge is None]
    notes += [f"{run.name}: not evaluated yet; bilm-train eval {quote(str(run.folder.path))}" for run in unmeasured]
    return notes


def _columns(table: Table) -> list[tuple[int, Literal["<", ">"]]]:
    """Width and side of each column: numbers to the right."""
    columns: list[tuple[int, Literal["<", ">"]]] = []
    for cells in zip(*table, strict=True):
        words = cells[0] in ("run", "residual", "treebank")
        columns.append((max(map(len, cells)), "<" if words else ">"))
    return columns


def _plain(table: Table) -> str:
    columns = _columns(table)
    rows = [
        "  ".join(f"{cell:{side}{width}}" for cell, (width, side) in zip(row, columns, strict=True)) for row in table
    ]
    return "\n".join(row.rstrip() for row in rows)


def _markdown(table: Table) -> str:
    rule = ["---" if side == "<" else "---:" for _, side in _columns(table)]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


# ---- the folder ---------------------------------------------------------------------------------------------------


def _write(runs: Sequence[Run], tables: Sequence[Table], notes: Sequence[str], out: Path) -> Path:
    try:
        from bilm_training.runs import compare_plots  # noqa: PLC0415 -- only this needs matplotlib
    except ModuleNotFoundError as error:
        raise RunError(f"{error}: plots need matplotlib; leave --out away, or pip install matplotlib") from error
    images = {
        "perplexity.png": ("Validation perplexity", compare_plots.perplexity(runs)),
        "unexplained.png": ("Students: what they don't explain of their teachers", compare_plots.unexplained(runs)),
        "probes.png": ("Parts of speech, by layer", compare_plots.probes(runs)),
        "cost.png": ("Size, and speed of training", compare_plots.cost(runs)),
    }
    parts = ["# Runs compared", *map(_markdown, tables), "\n".join(f"- {note}" for note in notes)]
    out.mkdir(parents=True, exist_ok=True)
    for name, (title, image) in images.items():
        if image is not None:
            write_bytes(out / name, image)
            parts.append(f"## {title}\n\n![{title}]({name})")
    write_text(out / PAGE, "\n\n".join(parts) + "\n")
    return out / PAGE
