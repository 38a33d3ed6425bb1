"""The plots of experiments: each takes the results and returns an SVG, or None where its measurements are missing."""

from typing import Any

from bilm_bench.reporting.drawing import COLOURS, drawing, new_figure, to_svg
from bilm_bench.reporting.numbers import short

Results = dict[str, Any]

_CONTESTANTS = {"bilm-serve": "blue", "Triton, this engine": "orange", "Triton, published order": "grey"}


def speedups(results: Results) -> str | None:
    """Plot every precision and cache against the baseline."""
    found = [one for one in measurements(results, "speedup/") if not one["key"].endswith("/best")]
    return _bars(found, _labels(found), "times the baseline's tokens/s")


def tokens_per_s(results: Results) -> str | None:
    """Plot the same in tokens a second."""
    found = measurements(results, "tokens_per_s/")
    return _bars(found, _labels(found), "tokens/s in process", logarithmic=True)


def roofline(results: Results) -> str | None:
    """Plot the share of the fastest products."""
    found = measurements(results, "roofline/")
    return _bars(found, _labels(found), "share of the measured product rate, %", limit=100)


def in_flight(results: Results) -> str | None:
    """Plot the throughput with few sentences in flight."""
    found = [one for one in measurements(results, "in_flight/") if not one["key"].endswith("/share")]
    return _bars(found, [f"{label} in flight" for label in _labels(found)], "tokens/s, original float32")


def served(results: Results) -> str | None:
    """Plot the throughput of the server against in process."""
    found = [one for one in measurements(results, "served/") if one["key"].endswith("/share")]
    labels = [_served_label(one["key"]) for one in found]
    return _bars(found, labels, "tokens/s through the server, % of in process", limit=100)


def short_among_long(results: Results) -> str | None:
    """Plot how many of the short sentences were done after how long."""
    detail = results.get("details", {}).get("short among long")
    if detail is None:
        return None
    bound_ms = detail["ticks"] * sum(detail["tick_ms_before_and_after"]) / len(detail["tick_ms_before_and_after"])
    with drawing():
        figure, (axes,) = new_figure(height=4.0)
        axes.plot(detail["alone_ms"], detail["percents"], "o-", color=COLOURS["pale"], label="nothing else in flight")
        label = "more long ones than rows"
        axes.plot(detail["among_long_ms"], detail["percents"], "o-", color=COLOURS["blue"], label=label)
        bound = f"{detail['ticks']} ticks at the row limit"
        axes.axvline(bound_ms, color=COLOURS["ink"], linestyle=":", label=bound)
        target = "target for p99: 1.5 times that"
        axes.axvline(1.5 * bound_ms, color=COLOURS["red"], linestyle="--", label=target)
        axes.set_xlabel("latency of a 10-token sentence, ms")
        axes.set_ylabel("calls done, %")
        axes.set_xlim(left=0)
        axes.legend()
        return to_svg(figure)


def throughput_against_load(results: Results) -> str | None:
    """Plot what came back of what was offered."""
    sweep = results.get("details", {}).get("sweep")
    if not sweep:
        return None
    with drawing():
        figure, (axes,) = new_figure(height=4.4)
        for name, steps in sweep.items():
            offered = [step["offered_per_s"] for step in steps]
            completed = [step["completed_per_s"] for step in steps]
            axes.plot(offered, completed, "o-", color=COLOURS[_CONTESTANTS[name]], label=name)
        most = max(step["offered_per_s"] for steps in sweep.values() for step in steps)
        axes.plot([0, most], [0, most], ":", color=COLOURS["ink"], label="all that is offered")
        axes.set_xlabel("offered load, sentences/s (Poisson)")
        axes.set_ylabel("completed, sentences/s")
        axes.legend()
        return to_svg(figure)


def latency_against_load(results: Results) -> str | None:
    """Plot median and 99th percentile, from the moment for which each call was meant."""
    sweep = results.get("details", {}).get("sweep")
    if not sweep:
        return None
    with drawing():
        figure, (axes,) = new_figure(height=4.4)
        for name, steps in sweep.items():
            offered, colour = [step["offered_per_s"] for step in steps], COLOURS[_CONTESTANTS[name]]
            for percent, style in ((50, "o--"), (99, "o-")):
                latencies = [step[f"p{percent}_ms"] for step in steps]
                axes.plot(offered, latencies, style, color=colour, label=f"{name}, p{percent}", markersize=4)
        axes.axhline(500, color=COLOURS["red"], linestyle=":", label="limit for p99")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=1e4)  # a failed call counts as endless
        axes.set_xlabel("offered load, sentences/s (Poisson)")
        axes.set_ylabel("latency, ms")
        axes.legend(fontsize=8)
        return to_svg(figure)


def measurements(results: Results, prefix: str) -> list[dict[str, Any]]:
    """Return the measurements whose key begins so."""
    return [one for one in results.get("figures", []) if one["key"].startswith(prefix)]


def _labels(found: list[dict[str, Any]]) -> list[str]:
    return [one["key"].partition("/")[2].replace("/", ", ").replace("float32", "f32") for one in found]


def _served_label(key: str) -> str:
    _, size, what, dtype, per_call, _ = key.split("/")
    return f"{size}, {what}, {dtype}, {per_call} a call"


def _bars(
    found: list[dict[str, Any]], labels: list[str], axis: str, *, limit: float | None = None, logarithmic: bool = False
) -> str | None:
    """Plot medians as bars, the rounds' range as whiskers, targets as marks."""
    if not found:
        return None
    medians = [one["found"]["median"] for one in found]
    below = [one["found"]["median"] - one["found"]["minimum"] for one in found]
    above = [one["found"]["maximum"] - one["found"]["median"] for one in found]
    places = range(len(found))
    with drawing():
        figure, (axes,) = new_figure(height=0.9 + 0.36 * len(found))
        axes.barh(places, medians, xerr=(below, above), color=COLOURS["pale"], ecolor=COLOURS["ink"], height=0.62)
        for place, one in zip(places, found, strict=True):
            at_the_axis = ("axes fraction", "data")
            axes.annotate(short(one["found"]["median"]), (0.006, place), xycoords=at_the_axis, va="center", fontsize=9)
            if one["target"] is not None:
                axes.plot([one["target"]] * 2, [place - 0.42, place + 0.42], color=COLOURS["red"], linewidth=2)
        if any(one["target"] is not None for one in found):
            axes.plot([], [], color=COLOURS["red"], linewidth=2, label="target")
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0))
        axes.set_yticks(list(places), labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(axis)
        if logarithmic:
            axes.set_xscale("log")
        if limit is not None:
            axes.set_xlim(0, max(limit, 1.05 * max(one["found"]["maximum"] for one in found)))
        return to_svg(figure)
