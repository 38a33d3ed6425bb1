"""Metrics of what was counted and sampled, as a report has them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilm_bench.resources import Resources
from bilm_bench.statistics.counters import HealthCounters, Latencies, StepCounters
from bilm_bench.statistics.histogram import Histogram
from bilm_bench.workload.calls import CallKind

PERCENTILES = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p999_ms": 99.9}
_MIB = 2**20
# Of a soak: in the first fifth caches still fill.
_SETTLED = 0.2
_LEAST_POINTS = 5

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One moment of a run.

    Attributes:
        at_s: Seconds since the run began.
        window: Metrics of what ended since the sample before.
        in_flight: Calls under way.
        bench: Resources of this process.
        server: Resources of the server; empty where they aren't known.
    """

    at_s: float
    window: Mapping[str, float | None]
    in_flight: int
    bench: Resources
    server: Resources

    def metrics(self) -> Metrics:
        """Return the sample as a report has it."""
        return {
            "at_s": self.at_s,
            **self.window,
            "in_flight": self.in_flight,
            "bench_memory_mib": _mib(self.bench.memory_bytes),
            "bench_descriptors": self.bench.descriptors,
            "server_memory_mib": _mib(self.server.memory_bytes),
            "server_descriptors": self.server.descriptors,
        }


def step_metrics(counters: StepCounters) -> Metrics:
    """Return the metrics of a step, or of the whole run."""
    length_s = max(counters.length_s, 1e-9)
    ended = {kind: counters.latencies[kind].meant.count for kind in CallKind}
    failed = ended[CallKind.FAILED] + counters.not_sent + counters.errors["NO_END", ""]
    counted = ended[CallKind.ACCEPTED] + ended[CallKind.REFUSED] + failed
    refused = counters.latencies[CallKind.REFUSED]
    pushed_back = counters.pushbacks.count + counters.never_retry
    return {
        "length_s": counters.length_s,
        "calls": counters.calls,
        "offered_sentences_per_s": counters.sentences / length_s,
        "offered_tokens_per_s": counters.tokens / length_s,
        "sentences_per_s": counters.sentences_in_time / length_s,
        "tokens_per_s": counters.tokens_in_time / length_s,
        "accepted": _latency_metrics(counters.latencies[CallKind.ACCEPTED]),
        "refused": {
            **_latency_metrics(refused),
            "with_pushback": counters.pushbacks.count,
            "never_retry": counters.never_retry,
            "without_pushback": refused.meant.count - pushed_back,
            "pushback_p50_ms": _ms(counters.pushbacks.percentile_s(50)),
            "pushback_max_ms": _ms(counters.pushbacks.max_s if counters.pushbacks.count else None),
        },
        "failed": failed,
        "refused_rate": ended[CallKind.REFUSED] / counted if counted else None,
        "error_rate": failed / counted if counted else None,
        "errors": [
            {"status": status, "reason": reason, "calls": calls, "message": counters.messages.get((status, reason), "")}
            for (status, reason), calls in counters.errors.most_common()
        ],
        "sentence_errors": dict(counters.sentence_errors.most_common()),
        "failed_sentences": counters.sentence_errors.total(),
        "checked_answers": counters.checked,
        "wrong_answers": counters.wrong,
        "overdue": counters.overdue,
        "unfinished": counters.unfinished,
        "late_p99_ms": _ms(counters.lateness.percentile_s(99)),
    }


def health_metrics(counters: HealthCounters) -> Metrics:
    """Return the metrics of the health checks."""
    serving = counters.statuses["SERVING"]
    return {
        "checks": counters.statuses.total() + counters.errors.total(),
        "not_serving": counters.statuses.total() - serving,
        "unanswered": counters.errors.total(),
        "errors": dict(counters.errors.most_common()),
        **_percentiles(counters.latencies),
    }


def resource_metrics(points: Sequence[tuple[float, Resources]], *, with_slopes: bool) -> Metrics:
    """Return a process's metrics from (seconds, resources); slopes are per hour, without the first fifth."""
    memory = [(at_s, found.memory_bytes / _MIB) for at_s, found in points if found.memory_bytes is not None]
    descriptors = [(at_s, float(found.descriptors)) for at_s, found in points if found.descriptors is not None]
    metrics: Metrics = {}
    for name, series in (("memory_mib", memory), ("descriptors", descriptors)):
        values = [value for _, value in series]
        metrics[f"{name}_first"] = values[0] if values else None
        metrics[f"{name}_last"] = values[-1] if values else None
        metrics[f"{name}_max"] = max(values, default=None)
        metrics[f"{name}_per_hour"] = slope_per_hour(series) if with_slopes else None
    return metrics


def slope_per_hour(series: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope of the least-squares line through (seconds, value) without the first fifth, if it has enough."""
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


def window_metrics(accepted: Histogram, counts: Mapping[str, float], length_s: float) -> dict[str, float | None]:
    """Return latencies and rates of what ended between two samples."""
    rates = {f"{name}_per_s": count / max(length_s, 1e-9) for name, count in counts.items()}
    return {**rates, "p50_ms": _ms(accepted.percentile_s(50)), "p99_ms": _ms(accepted.percentile_s(99))}


def run_metrics(
    total: StepCounters, health: HealthCounters, samples: Sequence[Sample], cores: float, *, soak: bool
) -> Metrics:
    """Return the metrics of the run as a whole; conditions may be put on each number."""
    bench = resource_metrics([(sample.at_s, sample.bench) for sample in samples], with_slopes=soak)
    return {
        **step_metrics(total),
        "health": health_metrics(health),
        "bench": {"cores": cores, **bench},
        "server": resource_metrics([(sample.at_s, sample.server) for sample in samples], with_slopes=soak),
    }


def metrics_of_nothing() -> Metrics:
    """Return the metrics of a run in which nothing happened, for their names."""
    return run_metrics(StepCounters(), HealthCounters(), (), 0.0, soak=True)


def _latency_metrics(latencies: Latencies) -> Metrics:
    return {
        "calls": latencies.meant.count,
        **_percentiles(latencies.meant),
        "since_sent": _percentiles(latencies.sent),
    }


def _percentiles(histogram: Histogram) -> Metrics:
    found: Metrics = {name: _ms(histogram.percentile_s(percent)) for name, percent in PERCENTILES.items()}
    return {**found, "max_ms": _ms(histogram.max_s if histogram.count else None)}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _mib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / _MIB
