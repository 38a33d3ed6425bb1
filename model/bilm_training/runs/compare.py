"""Runs side by side: `bilm-train compare`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import Literal

from bilm_system.files import write_bytes, write_text

from bilm_training.errors import RunError
from bilm_training.evaluation.knowledge.scores import TreebankReport, best
from bilm_training.runs.finished_run import FinishedRun, read_runs

PAGE = "compare.md"
_NOTHING = "–"

Table = list[list[str]]  # the first row is the head


def load_plots() -> ModuleType:
    """Return the module of the plots, the only one that needs matplotlib."""
    from bilm_training.runs import compare_plots  # noqa: PLC0415 - see above

    return compare_plots


def compare(runs: Sequence[Path], out: Path | None = None, load_plots: Callable[[], ModuleType] = load_plots) -> str:
    """Return tables of runs for a terminal; with `out`, also as compare.md in that folder, with plots beside it.

    A run may still be going on or have been interrupted; what it doesn't have yet is left blank.

    Args:
        runs: their folders.
        out: the folder for the page.
        load_plots: returns what draws, for the page only.

    Raises:
        RunError: naming every folder that is no run, or what is damaged in one.
        OSError: if something can't be written.
    """
    found = read_runs(runs)
    tables, notes = _tables(found), _notes(found)
    parts = [*map(_plain, tables), "\n".join(notes)]
    if out is not None:
        parts.append(f"written to {_write(found, tables, notes, out, load_plots)}")
    return "\n\n".join(part for part in parts if part)


# ---- tables -------------------------------------------------------------------------------------------------------


def _tables(runs: Sequence[FinishedRun]) -> list[Table]:
    learners, students = _by_kind(runs)
    tables = [_learners_table(learners)] if learners else []
    if students:
        tables.append(_students_table(students))
    if any(run.treebanks for run in runs):
        tables.append(_probes_table(runs))
    return tables


def _by_kind(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """Return those that learnt words, and those that learnt a teacher's vectors."""
    return [run for run in runs if not run.student], [run for run in runs if run.student]


def _learners_table(runs: Sequence[FinishedRun]) -> Table:
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


def _students_table(runs: Sequence[FinishedRun]) -> Table:
    head = [*_RUN_HEAD, "unexplained fwd %", "unexplained bwd %", "unexplained mean %"]
    return [head, *([*_run_cells(run), *_valid_cells(run, 100)] for run in runs)]


_RUN_HEAD = ["run", "size", "residual", "steps", "epochs", "best", "minutes", "tokens/s"]


def _run_cells(run: FinishedRun) -> list[str]:
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


def _valid_cells(run: FinishedRun, factor: int = 1) -> list[str]:
    top = run.best
    metrics = (top.valid_forward, top.valid_backward, top.valid_mean) if top else (math.nan,) * 3
    return [_number(factor * metric, 1) for metric in metrics]


def _tested(run: FinishedRun) -> dict[tuple[str, int], float]:
    """Return the mean perplexity on each text, by its name and number of tokens."""
    found = run.knowledge.perplexity if run.knowledge else {}
    return {(name, measured.tokens): measured.mean for name, measured in found.items()}


def _probes_table(runs: Sequence[FinishedRun]) -> Table:
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


def _notes(runs: Sequence[FinishedRun]) -> list[str]:
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


def _write(
    runs: Sequence[FinishedRun],
    tables: Sequence[Table],
    notes: Sequence[str],
    out: Path,
    load_plots: Callable[[], ModuleType],
) -> Path:
    try:
        compare_plots = load_plots()
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
