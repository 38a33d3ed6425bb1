"""Figures of what was counted and sampled, as a report has them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilm_bench.resources import Resources
from bilm_bench.statistics.counters import Latencies, Tally
from bilm_bench.statistics.histogram import Histogram
from bilm_bench.workload.calls import Kind
from bilm_bench.workload.probe import HealthTally

PERCENTILES = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p999_ms": 99.9}
_MIB = 2**20
# Of a soak: in the first fifth caches still fill.
_SETTLED = 0.2
_LEAST_POINTS = 5

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One moment of a run.

    Attributes:
        at_s: since the run began.
        window: figures of what ended since the sample before.
        in_flight: calls under way.
        bench: our own process.
        server: the server's; empty where it isn't known.
    """

    at_s: float
    window: Mapping[str, float | None]
    in_flight: int
    bench: Resources
    server: Resources

    def figures(self) -> Figures:
        """As a report has them."""
        return {
            "at_s": self.at_s,
            **self.window,
            "in_flight": self.in_flight,
            "bench_memory_mib": _mib(self.bench.memory_bytes),
            "bench_descriptors": self.bench.descriptors,
            "server_memory_mib": _mib(self.server.memory_bytes),
            "server_descriptors": self.server.descriptors,
        }


def tally_figures(tally: Tally) -> Figures:
    """Of a step, or of the whole run."""
    length_s = max(tally.length_s, 1e-9)
    ended = {kind: tally.latencies[kind].meant.count for kind in Kind}
    failed = ended[Kind.FAILED] + tally.not_sent + tally.errors["NO_END", ""]
    counted = ended[Kind.ACCEPTED] + ended[Kind.REFUSED] + failed
    refused = tally.latencies[Kind.REFUSED]
    pushed_back = tally.pushbacks.count + tally.never_retry
    return {
        "length_s": tally.length_s,
        "calls": tally.calls,
        "offered_sentences_per_s": tally.sentences / length_s,
        "offered_tokens_per_s": tally.tokens / length_s,
        "sentences_per_s": tally.sentences_in_time / length_s,
        "tokens_per_s": tally.tokens_in_time / length_s,
        "accepted": _latency_figures(tally.latencies[Kind.ACCEPTED]),
        "refused": {
            **_latency_figures(refused),
            "with_pushback": tally.pushbacks.count,
            "never_retry": tally.never_retry,
            "without_pushback": refused.meant.count - pushed_back,
            "pushback_p50_ms": _ms(tally.pushbacks.percentile_s(50)),
            "pushback_max_ms": _ms(tally.pushbacks.max_s if tally.pushbacks.count else None),
        },
        "failed": failed,
        "refused_rate": ended[Kind.REFUSED] / counted if counted else None,
        "error_rate": failed / counted if counted else None,
        "errors": [
            {"status": status, "reason": reason, "calls": calls, "message": tally.messages.get((status, reason), "")}
            for (status, reason), calls in tally.errors.most_common()
        ],
        "sentence_errors": dict(tally.sentence_errors.most_common()),
        "failed_sentences": tally.sentence_errors.total(),
        "checked_answers": tally.checked,
        "wrong_answers": tally.wrong,
        "overdue": tally.overdue,
        "unfinished": tally.unfinished,
        "late_p99_ms": _ms(tally.lateness.percentile_s(99)),
    }


def health_figures(tally: HealthTally) -> Figures:
    """Of the health checks."""
    serving = tally.statuses["SERVING"]
    return {
        "checks": tally.statuses.total() + tally.errors.total(),
        "not_serving": tally.statuses.total() - serving,
        "unanswered": tally.errors.total(),
        "errors": dict(tally.errors.most_common()),
        **_percentiles(tally.latencies),
    }


def resource_figures(points: Sequence[tuple[float, Resources]], *, with_slopes: bool) -> Figures:
    """Of one process, from (seconds, resources); slopes are an hour's, without the first fifth of the time."""
    memory = [(at_s, found.memory_bytes / _MIB) for at_s, found in points if found.memory_bytes is not None]
    descriptors = [(at_s, float(found.descriptors)) for at_s, found in points if found.descriptors is not None]
    figures: Figures = {}
    for name, series in (("memory_mib", memory), ("descriptors", descriptors)):
        values = [value for _, value in series]
        figures[f"{name}_first"] = values[0] if values else None
        figures[f"{name}_last"] = values[-1] if values else None
        figures[f"{name}_max"] = max(values, default=None)
        figures[f"{name}_per_hour"] = slope_per_hour(series) if with_slopes else None
    return figures


def slope_per_hour(series: Sequence[tuple[float, float]]) -> float | None:
    """Of the line that fits (seconds, value) best by least squares, without the first fifth; None of a few points."""
    if not series:
        return None
    settled_s = series[0][0] + _SETTLED * (series[-1][0] - series[0][0])
    points = [point for point in series if point[0] >= settled_s]
    if len(points) < _LEAST_POINTS:
        return None
    mean_s = sum(at_s for at_s, _ in points) / len(points)
    mean = sum(value for _, value in points) / len(points)
    spread = sum((at_s - mean_s) ** 2 for at_s, _ in points)
    return 3600 * sum((at_s - mean_s) * (value - mean) for at_s, value in points) / spread if spread else None


def window_figures(accepted: Histogram, counts: Mapping[str, float], length_s: float) -> dict[str, float | None]:
    """Of what ended between two samples: latencies, and the counts a second."""
    rates = {f"{name}_per_s": count / max(length_s, 1e-9) for name, count in counts.items()}
    return {**rates, "p50_ms": _ms(accepted.percentile_s(50)), "p99_ms": _ms(accepted.percentile_s(99))}


def run_figures(total: Tally, health: HealthTally, samples: Sequence[Sample], cores: float, *, soak: bool) -> Figures:
    """Everything that is of the run as a whole; conditions may be put on each number."""
    bench = resource_figures([(sample.at_s, sample.bench) for sample in samples], with_slopes=soak)
    return {
        **tally_figures(total),
        "health": health_figures(health),
        "bench": {"cores": cores, **bench},
        "server": resource_figures([(sample.at_s, sample.server) for sample in samples], with_slopes=soak),
    }


def figures_of_nothing() -> Figures:
    """The figures of a run in which nothing happened: their names."""
    return run_figures(Tally(), HealthTally(), (), 0.0, soak=True)


def _latency_figures(latencies: Latencies) -> Figures:
    return {
        "calls": latencies.meant.count,
        **_percentiles(latencies.meant),
        "since_sent": _percentiles(latencies.sent),
    }


def _percentiles(histogram: Histogram) -> Figures:
    found: Figures = {name: _ms(histogram.percentile_s(percent)) for name, percent in PERCENTILES.items()}
    return {**found, "max_ms": _ms(histogram.max_s if histogram.count else None)}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _mib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / _MIB
