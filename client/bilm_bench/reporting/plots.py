"""The plots of `bilm-bench`: each takes a report and returns an SVG, or None where it has nothing to show."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from bilm_bench.reporting.drawing import COLOURS, drawing, make_logarithmic, new_figure, to_svg
from bilm_bench.reporting.report import Report

_LEAST_STEPS, _LEAST_SAMPLES = 2, 3
_MINUTES_FROM_S = 600.0


def throughput_against_load(report: Report) -> str | None:
    """Plot what was answered of what was offered, or by how many callers."""
    steps = report["steps"]
    if len(steps) < _LEAST_STEPS:
        return None
    with drawing():
        figure, (axes,) = new_figure()
        loads, answered = _loads(report), [step["sentences_per_s"] for step in steps]
        axes.plot(loads, answered, "o-", color=COLOURS["blue"], label="answered")
        if report["choices"]["loop"] == "open":
            axes.plot([0, max(loads)], [0, max(loads)], ":", color=COLOURS["grey"], label="all that is offered")
            refused = [step["offered_sentences_per_s"] * (step["refused_rate"] or 0.0) for step in steps]
            failed = [step["offered_sentences_per_s"] * (step["error_rate"] or 0.0) for step in steps]
            _if_any(axes, loads, refused, "refused", COLOURS["orange"])
            _if_any(axes, loads, failed, "failed", COLOURS["red"])
        axes.set_xlabel(_load_axis(report))
        axes.set_ylabel("sentences/s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend()
        return to_svg(figure)


def latency_against_load(report: Report) -> str | None:
    """Plot percentiles of accepted calls."""
    steps = report["steps"]
    if len(steps) < _LEAST_STEPS:
        return None
    with drawing():
        figure, (axes,) = new_figure()
        for name, style, colour in _LATENCIES:
            values = _numeric([step["accepted"][name] for step in steps])
            axes.plot(_loads(report), values, style, color=COLOURS[colour], label=_percentile(name), markersize=4)
        make_logarithmic(axes)
        axes.set_xlim(left=0)
        axes.set_xlabel(_load_axis(report))
        axes.set_ylabel("latency, ms")
        axes.legend()
        return to_svg(figure)


_LATENCIES = (
    ("p50_ms", "o-", "blue"),
    ("p90_ms", "o--", "blue"),
    ("p99_ms", "o-", "orange"),
    ("p999_ms", "o--", "red"),
)


def latency_over_time(report: Report) -> str | None:
    """Plot latencies of accepted calls, by when they ended."""
    samples = report["samples"][1:]
    if len(samples) < _LEAST_SAMPLES:
        return None
    with drawing():
        figure, (axes,) = new_figure()
        for name, colour in (("p50_ms", "blue"), ("p99_ms", "orange")):
            values = _numeric([sample[name] for sample in samples])
            axes.plot(_times(samples), values, color=COLOURS[colour], label=_percentile(name))
        make_logarithmic(axes)
        axes.set_ylabel("latency, ms")
        _finish_time(axes, samples)
        return to_svg(figure)


def calls_over_time(report: Report) -> str | None:
    """Plot how calls ended, by when."""
    samples = report["samples"][1:]
    if len(samples) < _LEAST_SAMPLES:
        return None
    with drawing():
        figure, (axes,) = new_figure()
        for name, colour in (("accepted", "blue"), ("refused", "orange"), ("failed", "red")):
            rates = [sample[f"{name}_per_s"] for sample in samples]
            _if_any(axes, _times(samples), rates, name, COLOURS[colour], marker="")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("calls/s")
        _finish_time(axes, samples)
        return to_svg(figure)


def resources_over_time(report: Report) -> str | None:
    """Plot memory and descriptors of both sides."""
    samples = report["samples"]
    if len(samples) < _LEAST_SAMPLES:
        return None
    with drawing():
        figure, both = new_figure(2)
        for axes, what, unit in zip(both, ("memory_mib", "descriptors"), ("MiB resident", "descriptors"), strict=True):
            for name, colour in (("server", "blue"), ("bench", "grey")):
                values = [sample[f"{name}_{what}"] for sample in samples]
                _if_any(axes, _times(samples), _numeric(values), name, COLOURS[colour], marker="")
            axes.set_ylim(bottom=0)
            axes.set_ylabel(unit)
            _finish_time(axes, samples)
        return to_svg(figure)


def _if_any(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, colour: str, *, marker: str = "o") -> None:
    if any(value > 0 for value in y):
        axes.plot(x, y, marker=marker, color=colour, label=label, markersize=4)


def _loads(report: Report) -> list[float]:
    name = "offered_sentences_per_s" if report["choices"]["loop"] == "open" else "load"
    return [step[name] for step in report["steps"]]


def _load_axis(report: Report) -> str:
    is_open = report["choices"]["loop"] == "open"
    return "offered load, sentences/s (Poisson)" if is_open else "callers, each with one call under way"


def _percentile(name: str) -> str:
    return "p99.9" if name == "p999_ms" else name.removesuffix("_ms")


def _numeric(values: Sequence[float | None]) -> list[float]:
    """With gaps where nothing was measured."""
    return [float("nan") if value is None else value for value in values]


def _unit(samples: Sequence[dict[str, Any]]) -> tuple[str, float]:
    return ("minutes", 60.0) if samples[-1]["at_s"] >= _MINUTES_FROM_S else ("seconds", 1.0)


def _times(samples: Sequence[dict[str, Any]]) -> list[float]:
    _, divisor = _unit(samples)
    return [sample["at_s"] / divisor for sample in samples]


def _finish_time(axes: Axes, samples: Sequence[dict[str, Any]]) -> None:
    unit, _ = _unit(samples)
    axes.set_xlabel(f"{unit} since the load began")
    axes.set_xlim(left=0)
    if axes.lines:
        axes.legend()
