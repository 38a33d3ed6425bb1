"""The comparison's plots: each takes the runs and gives a PNG, or None where there is nothing to draw."""

import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from bilm_training.evaluation.knowledge.scores import ProbeScore, TreebankReport
from bilm_training.runs.finished_run import FinishedRun
from bilm_training.runs.records import EpochRecord

Curve = list[EpochRecord]
Legend = list[tuple[Line2D | Patch, str]]

_INK, _GRID, _PALE = "#37352f", "#e6e6e3", 0.35
_COLOURS = ("#0b6e99", "#d9730d", "#1d7a46", "#c4352b", "#6940a5", "#8a6d3b", "#ad1a72", "#6b6b6b")
_LINES, _HATCHES = ("-", "--", ":", "-."), ("", "//", "xx", "..")  # for more runs than colours
_NUMBERS = StrMethodFormatter("{x:,.10g}")
_MOST_LABELLED_BARS = 15  # more would write over each other
_STYLE: Any = {  # matplotlib's type for it is a list of all names
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a folder's name is a $
}


def perplexity(runs: Sequence[FinishedRun]) -> bytes | None:
    """Validation perplexity, mean of both directions, against steps and against minutes; without students."""
    return _learning({n: run for n, run in enumerate(runs) if not run.student}, "validation perplexity", 1)


def unexplained(runs: Sequence[FinishedRun]) -> bytes | None:
    """Draw the share of a teacher's variance that its student doesn't explain, against steps and minutes."""
    return _learning({n: run for n, run in enumerate(runs) if run.student}, "unexplained, %", 100)


def _learning(runs: Mapping[int, FinishedRun], label: str, factor: int) -> bytes | None:
    """Draw the metric of the validation text over the epochs, times a factor; each run's number gives its colour."""
    curves = {
        n: [epoch for epoch in run.epochs if math.isfinite(epoch.valid_mean)] for n, run in runs.items() if run.best
    }
    if not curves:
        return None
    with mpl.rc_context(_STYLE):
        figure = _figure(3.6)
        by_step, by_minute = figure.subplots(1, 2, sharey=True)
        _draw_curves(by_step, curves, lambda epoch: epoch.step, "steps", factor)
        _draw_curves(by_minute, curves, lambda epoch: epoch.seconds / 60, "minutes", factor)
        values = [epoch.valid_mean for curve in curves.values() for epoch in curve]
        if max(values) > 5 * min(values):
            by_step.set_yscale("log")
            _plain_numbers(by_step.yaxis, (1, 2, 5))
        by_step.set_ylabel(label)
        legend: Legend = [(Line2D([], [], **_line(n)), runs[n].name) for n in curves]
        _add_legend(figure, [*legend, (Line2D([], [], **_ring(_INK)), "best epoch")])
        return _png(figure)


def cost(runs: Sequence[FinishedRun]) -> bytes | None:
    """Parameters, and tokens learnt a second."""
    sizes = [(run.n_parameters or math.nan) / 1e6 for run in runs]
    speeds = [run.tokens_per_s for run in runs]
    if not any(map(math.isfinite, sizes + speeds)):
        return None
    with mpl.rc_context(_STYLE):
        figure = _figure(0.8 + 0.3 * len(runs))
        by_size, by_speed = figure.subplots(1, 2, sharey=True)
        _draw_amounts(by_size, sizes, 1, "parameters, million")
        _draw_amounts(by_speed, speeds, 0, "tokens/s in training")
        by_size.set_yticks(range(len(runs)), [run.name for run in runs])
        by_size.set_ylim(len(runs) - 0.5, -0.5)  # the first one on top
        return _png(figure)


def probes(runs: Sequence[FinishedRun]) -> bytes | None:
    """Accuracy of each layer, a panel a treebank; what typos take away is pale."""
    treebanks = list(dict.fromkeys(probe.name for run in runs for probe in run.treebanks))
    if not treebanks:
        return None
    with mpl.rc_context(_STYLE):
        figure = _figure(2.9 * len(treebanks))
        for axes, treebank in zip(figure.subplots(len(treebanks), squeeze=False)[:, 0], treebanks, strict=True):
            found = {n: p for n, run in enumerate(runs) for p in run.treebanks if p.name == treebank}
            _draw_probes(axes, found)
            axes.set_title(treebank, loc="left", fontsize=10)
        probed = [n for n, run in enumerate(runs) if run.treebanks]
        _add_legend(figure, [(Patch(**_fill(n)), runs[n].name) for n in probed] + _controls())
        return _png(figure)


# ---- curves -------------------------------------------------------------------------------------------------------


def _draw_curves(
    axes: Axes, curves: Mapping[int, Curve], x: Callable[[EpochRecord], float], label: str, factor: int
) -> None:
    for n, curve in curves.items():
        axes.plot([x(epoch) for epoch in curve], [factor * epoch.valid_mean for epoch in curve], **_line(n))
        best = min(curve, key=lambda epoch: epoch.valid_mean)
        axes.plot(x(best), factor * best.valid_mean, **_ring(_line(n)["color"]))
    ends = [x(curve[-1]) for curve in curves.values()]
    if max(ends) > 30 * min(ends) > 0:  # else the short run would be a smear at the edge
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis, (1, 3))  # more would write over each other
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_NUMBERS)
    axes.set_xlabel(label)


def _plain_numbers(axis: Axis, digits: tuple[int, ...]) -> None:
    """A logarithmic axis with 200, not 2·10²; numbers that begin with one of the digits."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(_NUMBERS)
    axis.set_minor_locator(NullLocator())


def _line(n: int) -> dict[str, Any]:
    style = _LINES[n // len(_COLOURS) % len(_LINES)]
    return {"color": _COLOURS[n % len(_COLOURS)], "linestyle": style, "marker": "o", "markersize": 3.5}


def _fill(n: int) -> dict[str, Any]:
    hatch = _HATCHES[n // len(_COLOURS) % len(_HATCHES)]
    return {"facecolor": _line(n)["color"], "edgecolor": "white", "linewidth": 0, "hatch": hatch}


def _ring(colour: str) -> dict[str, Any]:
    return {"color": colour, "linestyle": "", "marker": "o", "markersize": 10, "fillstyle": "none"}


# ---- bars ---------------------------------------------------------------------------------------------------------


def _draw_probes(axes: Axes, found: dict[int, TreebankReport]) -> None:
    layers = range(max(len(probe.model) for probe in found.values()))
    width = 0.8 / len(found)
    for k, (n, probe) in enumerate(found.items()):
        places = [layer + (k - (len(found) - 1) / 2) * width for layer in layers]
        labelled = len(found) * len(layers) <= _MOST_LABELLED_BARS
        for place, score in zip(places, probe.model, strict=False):  # fewer layers than another run has
            _draw_bar(axes, place, 0.9 * width, score, _fill(n), labelled=labelled)
        for place, score in zip(places, probe.random, strict=False):
            _draw_mark(axes, place, 0.9 * width, score)
    for identity in {probe.word_identity.accuracy for probe in found.values()}:
        axes.axhline(100 * identity, color=_INK, linestyle="--", linewidth=1)
    axes.set_xticks(layers, [f"LSTM {layer}" if layer else "tokens" for layer in layers])
    axes.grid(visible=False, axis="x")
    bottom = _bottom(found.values())
    axes.set_ylim(bottom, 102)
    axes.set_ylabel("accuracy, %" + (f"\n(axis from {bottom})" if bottom else ""))


def _draw_bar(axes: Axes, x: float, width: float, found: ProbeScore, fill: dict[str, Any], *, labelled: bool) -> None:
    low, high = sorted((100 * found.accuracy_with_typos, 100 * found.accuracy))
    axes.bar(x, low, width, **fill)
    axes.bar(x, high - low, width, bottom=low, alpha=_PALE, **fill)
    if labelled:
        axes.annotate(
            f"{100 * found.accuracy:.1f}", (x, high), (0, 2), textcoords="offset points", ha="center", fontsize=8
        )


def _draw_mark(axes: Axes, x: float, width: float, found: ProbeScore) -> None:
    ends = (x - width / 2, x + width / 2)
    axes.hlines(100 * found.accuracy, *ends, color="white", linewidth=4)  # seen on any colour
    axes.hlines(100 * found.accuracy, *ends, color=_INK, linewidth=1.8)


def _bottom(found: Collection[TreebankReport]) -> int:
    """Return the ten below all that is drawn: from 0 on, all bars would look the same."""
    shown = [value for probe in found for layer in probe.model for value in (layer.accuracy, layer.accuracy_with_typos)]
    shown += [layer.accuracy for probe in found for layer in probe.random]
    shown += [probe.word_identity.accuracy for probe in found]
    return max(0, math.floor(10 * min(shown) - 0.3) * 10)


def _controls() -> Legend:
    return [
        (Patch(color=_INK, alpha=_PALE), "pale: lost to typos"),
        (Line2D([], [], color=_INK, linewidth=1.8), "random weights"),
        (Line2D([], [], color=_INK, linestyle="--", linewidth=1), "word identity"),
    ]


def _draw_amounts(axes: Axes, values: Sequence[float], digits: int, label: str) -> None:
    """A bar across for each run that has a value."""
    for n, value in enumerate(values):
        if math.isfinite(value):
            axes.barh(n, value, 0.6, **_fill(n))
            axes.annotate(f"{value:,.{digits}f}", (value, n), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.2 * max(filter(math.isfinite, values), default=1))  # room for the longest bar's number
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_NUMBERS)
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")


# ---- the figure ---------------------------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    return Figure(figsize=(9, height), layout="constrained")


def _add_legend(figure: Figure, entries: Legend) -> None:
    """Below the axes, in as many columns as the names leave room for; the figure grows by its rows."""
    handles, labels = zip(*entries, strict=True)
    columns = max(1, min(len(entries), 110 // (max(map(len, labels)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.23 * math.ceil(len(entries) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _png(figure: Figure) -> bytes:
    # A figure without pyplot draws by Agg, whatever the screen is
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
