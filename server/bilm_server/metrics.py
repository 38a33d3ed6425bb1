"""Metrics for Prometheus."""

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bilm_system.control_groups import memory_limit_bytes
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import bilm_server
from bilm_server.admission import Cost
from bilm_server.calls import CallRecord
from bilm_server.errors import Code
from bilm_server.resources import Gpu

METHODS = ("Embed", "EmbedStream", "GetModel")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_INFO_PACKAGES = ("grpcio", "protobuf", "torch")


@dataclass(frozen=True)
class Taken:
    """Work admitted, and its limits.

    Attributes:
        used: tokens and bytes of answers.
        limit: of both.
    """

    used: Cost
    limit: Cost


@dataclass(frozen=True)
class DropCounts:
    """What the process has lost of log lines and alerts, since its start.

    Attributes:
        log_lines: that were not written.
        alerts: that were not sent.
    """

    log_lines: Callable[[], int]
    alerts: Callable[[], int]


NO_DROPS = DropCounts(lambda: 0, lambda: 0)
"""Of a process that has no log of its own."""


@dataclass(frozen=True, eq=False)
class ServerView:
    """What is read of the running server. Each function is called at each scrape, from another thread.

    Attributes:
        model: labels of `bilm_model_info`: name, version, precision, backend, tokenizer.
        kernel_paths: by part of the engine, the implementation that it runs on.
        max_rows: sentences computed at a time.
        max_connections: open at a time; 0: no limit.
        serving: whether health says SERVING.
        stalled_s: how long the engine has had work and made no progress; 0 while it makes some.
        rows: sentences being computed.
        waiting_sentences: that haven't joined the engine.
        cache: hits and misses of token vectors since the start.
        ticks: of the engine since the start.
        admitted: by room: "unary" and "stream".
        drops: log lines and alerts lost.
        no_log_calls: kept out of the access log since the start, by caller; "": without authentication.
        spans_failed: since the start.
        gpu: that computes; None: a CPU does.
    """

    model: Mapping[str, str]
    kernel_paths: Callable[[], Mapping[str, str]]
    max_rows: int
    max_connections: Callable[[], int]
    serving: Callable[[], bool]
    stalled_s: Callable[[], float]
    rows: Callable[[], int]
    waiting_sentences: Callable[[], int]
    cache: Callable[[], tuple[int, int]]
    ticks: Callable[[], int]
    admitted: Callable[[], Mapping[str, Taken]]
    drops: DropCounts
    no_log_calls: Callable[[], Mapping[str, int]]
    spans_failed: Callable[[], int]
    gpu: Gpu | None = None


class Metrics:
    """Counts calls and rounds in a registry of its own; sees every call (`CallObserver`).

    Calls marked as tests count like any others: load is load.
    """

    def __init__(self) -> None:
        """Name the metrics."""
        self.registry = CollectorRegistry()
        self._in_flight = self._gauge("requests_in_flight", "Calls begun and not ended.", "method")
        self._requests = self._counter("requests", "Calls ended.", "method", "code")
        self._refusals = self._counter("refusals", "Calls refused as a whole, by reason.", "method", "reason")
        self._durations = self._seconds("request_duration_seconds", "From begin to end of a call.", "method")
        self._queue = self._seconds("queue_seconds", "Longest wait of a call's sentences for the engine.", "method")
        self._inference = self._seconds("inference_seconds", "Longest time of a call's sentences in it.", "method")
        self._sentences = self._counter("sentences", "Sentences answered, with a result or an error.", "result")
        self._tokens = self._counter("tokens", "Tokens of sentences computed.")
        self._rounds = self._counter("rounds", "Rounds of the engine.", "result")
        self._rows = Histogram("bilm_round_rows", "Sentences in a round.", buckets=_ROWS, registry=self.registry)
        self._show_zeros()
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"bilm_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"bilm_{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"bilm_{name}", text, labels, buckets=_SECONDS, registry=self.registry)

    def _show_zeros(self) -> None:
        """A series that appears with its first event has no increase for Prometheus to see."""
        for method in METHODS:
            self._in_flight.labels(method)
            self._durations.labels(method)
            for code in ("OK", "INTERNAL", "UNAVAILABLE"):
                self._requests.labels(method, code)
        for method in ("Embed", "EmbedStream"):
            self._queue.labels(method)
            self._inference.labels(method)
            self._refusals.labels(method, "OVERLOADED")
        for result in ("ok", "failed"):
            self._sentences.labels(result)
            self._rounds.labels(result)

    # ---- on the event loop ----

    def begin(self, call: CallRecord) -> None:
        """Counts a call in."""
        self._in_flight.labels(call.method).inc()

    def end(self, call: CallRecord) -> None:
        """Counts a call out, and what it did."""
        self._in_flight.labels(call.method).dec()
        self._requests.labels(call.method, call.code or Code.UNKNOWN).inc()
        self._durations.labels(call.method).observe(call.duration_s)
        if call.reason:
            self._refusals.labels(call.method, call.reason).inc()
        n_computed = call.sentences - call.failed_sentences
        if n_computed:
            self._queue.labels(call.method).observe(call.queue_s)
            self._inference.labels(call.method).observe(call.inference_s)
            self._sentences.labels("ok").inc(n_computed)
            self._tokens.inc(call.tokens)
        if call.failed_sentences:
            self._sentences.labels("failed").inc(call.failed_sentences)

    # ---- in the inference thread ----

    def round(self, rows: int, failed: bool = False) -> None:
        """Counts a round of the engine; only those that succeed have their rows counted."""
        self._rounds.labels("failed" if failed else "ok").inc()
        if not failed:
            self._rows.observe(rows)


class ServerCollector(Collector):
    """Metrics that are read from the running server at each scrape."""

    def __init__(self, view: ServerView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Yield each metric; part of prometheus_client's interface."""
        view = self._view
        yield InfoMetricFamily("bilm_model", "The model served.", dict(view.model))
        yield InfoMetricFamily("bilm_build", "Versions.", _build_info())
        yield _kernel_paths(view.model["name"], view.kernel_paths())
        yield _one("bilm_health_serving", "1 while health says SERVING.", float(view.serving()))
        yield _one("bilm_engine_stalled_seconds", "Time with work and without progress.", view.stalled_s())
        yield _one("bilm_slots", "Sentences that can be computed at a time.", view.max_rows)
        yield _one("bilm_slots_in_use", "Sentences being computed.", view.rows())
        yield _one("bilm_waiting_sentences", "Sentences that wait for the engine.", view.waiting_sentences())
        yield _one("bilm_connections_limit", "Connections at a time; 0: no limit.", view.max_connections())
        yield _one("bilm_memory_limit_bytes", "Of the control group or the machine.", memory_limit_bytes())
        yield _count("bilm_engine_ticks", "Steps of all rounds.", view.ticks())
        hits, misses = view.cache()
        yield _count("bilm_token_cache_hits", "Tokens whose vector was there already.", hits)
        yield _count("bilm_token_cache_misses", "Tokens whose vector was computed.", misses)
        yield _count("bilm_log_lines_dropped", "Log lines lost.", view.drops.log_lines())
        yield _count("bilm_alerts_dropped", "Errors that no alert could be sent about.", view.drops.alerts())
        yield _count("bilm_trace_spans_failed", "Spans that the collector didn't take.", view.spans_failed())
        yield _no_log_calls(view.no_log_calls())
        yield from _admission(view.admitted())
        if view.gpu is not None:
            yield from _gpu(view.gpu)


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)


def _no_log_calls(counts: Mapping[str, int]) -> Metric:
    found = CounterMetricFamily("bilm_no_log_calls", "Calls kept out of the access log.", labels=["caller"])
    for caller, count in counts.items():
        found.add_metric([caller], count)
    return found


def _kernel_paths(model: str, paths: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(
        "bilm_kernel_path",
        "1 for the implementation that a part of the engine runs on.",
        labels=["model", "part", "path"],
    )
    for part, path in paths.items():
        family.add_metric([model, part, path], 1.0)
    return family


def _admission(taken: Mapping[str, Taken]) -> Iterator[Metric]:
    tokens = GaugeMetricFamily(
        "bilm_admitted_tokens", "Tokens of calls not computed, of streams not sent.", labels=["room"]
    )
    token_limit = GaugeMetricFamily("bilm_admitted_tokens_limit", "Their limit.", labels=["room"])
    answers = GaugeMetricFamily("bilm_admitted_answer_bytes", "Bytes of answers not sent.", labels=["room"])
    answer_limit = GaugeMetricFamily("bilm_admitted_answer_bytes_limit", "Their limit.", labels=["room"])
    for room, work in taken.items():
        tokens.add_metric([room], work.used.tokens)
        token_limit.add_metric([room], work.limit.tokens)
        answers.add_metric([room], work.used.answer_bytes)
        answer_limit.add_metric([room], work.limit.answer_bytes)
    yield from (tokens, token_limit, answers, answer_limit)


def _gpu(gpu: Gpu) -> Iterator[Metric]:
    state = gpu.read()
    if state is not None:
        yield _one("bilm_gpu_memory_used_bytes", "Of the GPU, by all processes.", state.memory_used_bytes)
        yield _one("bilm_gpu_memory_bytes", "Of the GPU.", state.memory_bytes)
        yield _one("bilm_gpu_busy_ratio", "Share of recent time in which a kernel ran.", state.busy)


def _build_info() -> dict[str, str]:
    found = {"version": bilm_server.__version__, "python": platform.python_version()}
    for package in _INFO_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
