"""The page's plots: each takes the results and gives an SVG, or None where its figures are missing."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from bilm_bench.reporting.numbers import short
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = dict[str, Any]
Plot = Callable[[Results], str | None]

_COLOURS = {"bilm-serve": "#0b6e99", "Triton, this engine": "#d9730d", "Triton, published order": "#6b6b6b"}
_INK, _ACCENT, _SOFT, _TARGET = "#37352f", "#0b6e99", "#a8cfe0", "#c4352b"

mpl.use("Agg")
mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _INK,
        "axes.grid": True,
        "grid.color": "#e6e6e3",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "bilm-serve",  # the same figures give the same file
    }
)


def speedups(results: Results) -> str | None:
    """Every precision and cache against the baseline."""
    found = [figure for figure in figures(results, "speedup/") if not figure["key"].endswith("/best")]
    return _bars(found, _labels(found), "times the baseline's tokens/s")


def tokens_per_s(results: Results) -> str | None:
    """The same in tokens a second."""
    found = figures(results, "tokens_per_s/")
    return _bars(found, _labels(found), "tokens/s in process", logarithmic=True)


def roofline(results: Results) -> str | None:
    """Share of the fastest products."""
    found = figures(results, "roofline/")
    return _bars(found, _labels(found), "share of the measured product rate, %", limit=100)


def in_flight(results: Results) -> str | None:
    """Throughput with few sentences in flight."""
    found = [figure for figure in figures(results, "in_flight/") if not figure["key"].endswith("/share")]
    return _bars(found, [f"{label} in flight" for label in _labels(found)], "tokens/s, original float32")


def served(results: Results) -> str | None:
    """Through the server against in process."""
    found = [figure for figure in figures(results, "served/") if figure["key"].endswith("/share")]
    labels = [_served_label(figure["key"]) for figure in found]
    return _bars(found, labels, "tokens/s through the server, % of in process", limit=100)


def short_among_long(results: Results) -> str | None:
    """How many of the short sentences were done after how long."""
    detail = results.get("details", {}).get("short among long")
    if detail is None:
        return None
    figure, axes = _new(4.0)
    axes.plot(detail["alone_ms"], detail["percents"], "o-", color=_SOFT, label="nothing else in flight")
    axes.plot(detail["among_long_ms"], detail["percents"], "o-", color=_ACCENT, label="more long ones than rows")
    bound_ms = detail["ticks"] * sum(detail["tick_ms_before_and_after"]) / len(detail["tick_ms_before_and_after"])
    axes.axvline(bound_ms, color=_INK, linestyle=":", label=f"{detail['ticks']} ticks at the row limit")
    axes.axvline(1.5 * bound_ms, color=_TARGET, linestyle="--", label="target for p99: 1.5 times that")
    axes.set_xlabel("latency of a 10-token sentence, ms")
    axes.set_ylabel("calls done, %")
    axes.set_xlim(left=0)
    axes.legend()
    return _svg(figure)


def throughput_against_load(results: Results) -> str | None:
    """What came back of what was offered."""
    sweep = results.get("details", {}).get("sweep")
    if not sweep:
        return None
    figure, axes = _new(4.4)
    for name, steps in sweep.items():
        offered = [step["offered_per_s"] for step in steps]
        axes.plot(offered, [step["completed_per_s"] for step in steps], "o-", color=_COLOURS[name], label=name)
    most = max(step["offered_per_s"] for steps in sweep.values() for step in steps)
    axes.plot([0, most], [0, most], ":", color=_INK, label="all that is offered")
    axes.set_xlabel("offered load, sentences/s (Poisson)")
    axes.set_ylabel("completed, sentences/s")
    axes.legend()
    return _svg(figure)


def latency_against_load(results: Results) -> str | None:
    """Median and 99th percentile, from the moment for which each call was meant."""
    sweep = results.get("details", {}).get("sweep")
    if not sweep:
        return None
    figure, axes = _new(4.4)
    for name, steps in sweep.items():
        offered = [step["offered_per_s"] for step in steps]
        for percent, style in ((50, "o--"), (99, "o-")):
            latencies = [step[f"p{percent}_ms"] for step in steps]
            axes.plot(offered, latencies, style, color=_COLOURS[name], label=f"{name}, p{percent}", markersize=4)
    axes.axhline(500, color=_TARGET, linestyle=":", label="limit for p99")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1e4)  # a failed call took as good as for ever
    axes.set_xlabel("offered load, sentences/s (Poisson)")
    axes.set_ylabel("latency, ms")
    axes.legend(fontsize=8)
    return _svg(figure)


def figures(results: Results, prefix: str) -> list[dict[str, Any]]:
    """Those whose key begins so."""
    return [figure for figure in results.get("figures", []) if figure["key"].startswith(prefix)]


def _labels(found: list[dict[str, Any]]) -> list[str]:
    return [figure["key"].partition("/")[2].replace("/", ", ").replace("float32", "f32") for figure in found]


def _served_label(key: str) -> str:
    _, size, what, dtype, per_call, _ = key.split("/")
    return f"{size}, {what}, {dtype}, {per_call} a call"


def _bars(
    found: list[dict[str, Any]], labels: list[str], axis: str, *, limit: float | None = None, logarithmic: bool = False
) -> str | None:
    """Medians as bars, the rounds' range as whiskers, targets as marks."""
    if not found:
        return None
    figure, axes = _new(0.9 + 0.36 * len(found))
    medians = [one["found"]["median"] for one in found]
    below = [one["found"]["median"] - one["found"]["minimum"] for one in found]
    above = [one["found"]["maximum"] - one["found"]["median"] for one in found]
    places = range(len(found))
    axes.barh(places, medians, xerr=(below, above), color=_SOFT, ecolor=_INK, height=0.62)
    for place, one in zip(places, found, strict=True):
        at_the_axis = ("axes fraction", "data")
        axes.annotate(short(one["found"]["median"]), (0.006, place), xycoords=at_the_axis, va="center", fontsize=9)
        if one["target"] is not None:
            axes.plot([one["target"]] * 2, [place - 0.42, place + 0.42], color=_TARGET, linewidth=2)
    if any(one["target"] is not None for one in found):
        axes.plot([], [], color=_TARGET, linewidth=2, label="target")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes.set_yticks(list(places), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(axis)
    if logarithmic:
        axes.set_xscale("log")
    if limit is not None:
        axes.set_xlim(0, max(limit, 1.05 * max(one["found"]["maximum"] for one in found)))
    return _svg(figure)


def _new(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return file.getvalue()[file.getvalue().index("<svg") :]
