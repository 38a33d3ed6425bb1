"""Metrics for Prometheus: what is read from the running server at each scrape."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bilm_system.control_groups import memory_limit_bytes
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import bilm_server
from bilm_server.observability.resources import Gpu

_INFO_PACKAGES = ("grpcio", "protobuf", "torch")
_MODEL_LABELS = ("name", "version", "precision", "backend", "tokenizer")
_ENGINE_TEXTS = {
    "bilm_engine_stalled_seconds": "Time with work and without progress.",
    "bilm_slots": "Sentences that can be computed at a time.",
    "bilm_slots_in_use": "Sentences being computed.",
    "bilm_waiting_sentences": "Sentences that wait for the engine.",
    "bilm_engine_ticks": "Time steps of all rounds.",
    "bilm_token_cache_hits": "Tokens whose vector was there already.",
    "bilm_token_cache_misses": "Tokens whose vector was computed.",
}


@dataclass(frozen=True)
class Taken:
    """Work admitted, and its limits.

    Attributes:
        tokens: admitted.
        token_limit: of them.
        response_bytes: of what is admitted.
        response_bytes_limit: of them.
        batch_tokens: of those admitted, batch's.
    """

    tokens: int
    token_limit: int
    response_bytes: int
    response_bytes_limit: int
    batch_tokens: int


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
"""The counts of a process that has no log."""


@dataclass(frozen=True, eq=False)
class EngineView:
    """What is read of one model's engine. Each function is called at each scrape, from another thread.

    Attributes:
        model: labels of `bilm_model_info`: name, version, precision, backend, tokenizer.
        kernel_paths: by part of the engine, the implementation that it runs on.
        fallbacks: since the start, by part: something slower stands in for kernels that don't work.
        max_rows: sentences computed at a time.
        stalled_s: how long the engine has had work and made no progress; 0 while it makes some.
        rows: sentences being computed.
        waiting_sentences: that haven't joined the engine.
        waiting_by_priority: the same, by priority.
        rows_by_priority: rows that sentences hold, those included that rounds leave out.
        cache: hits and misses of token vectors since the start.
        ticks: of the engine since the start.
    """

    model: Mapping[str, str]
    kernel_paths: Callable[[], Mapping[str, str]]
    fallbacks: Callable[[], Mapping[str, int]]
    max_rows: int
    stalled_s: Callable[[], float]
    rows: Callable[[], int]
    waiting_sentences: Callable[[], int]
    waiting_by_priority: Callable[[], Mapping[str, int]]
    rows_by_priority: Callable[[], Mapping[str, int]]
    cache: Callable[[], tuple[int, int]]
    ticks: Callable[[], int]


@dataclass(frozen=True, eq=False)
class ServerView:
    """What is read of the running server. Each function is called at each scrape, from another thread.

    Attributes:
        engines: one for each model that is loaded.
        max_connections: open at a time; 0: no limit.
        serving: whether health says SERVING.
        admitted: by room: "unary" and "stream".
        drops: log lines and alerts lost.
        no_log_calls: kept out of the access log since the start, by caller; "": without authentication.
        spans_failed: since the start.
        gpu: that computes; None: a CPU does, or nothing yet.
    """

    engines: Callable[[], Sequence[EngineView]]
    max_connections: Callable[[], int]
    serving: Callable[[], bool]
    admitted: Callable[[], Mapping[str, Taken]]
    drops: DropCounts
    no_log_calls: Callable[[], Mapping[str, int]]
    spans_failed: Callable[[], int]
    gpu: Callable[[], Gpu | None] = lambda: None


class ServerCollector(Collector):
    """Metrics that are read from the running server at each scrape."""

    def __init__(self, view: ServerView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Yield each metric; part of prometheus_client's interface."""
        view = self._view
        yield InfoMetricFamily("bilm_build", "Versions.", _build_info())
        yield _one("bilm_health_serving", "1 while health says SERVING.", float(view.serving()))
        yield _one("bilm_connections_limit", "Connections at a time; 0: no limit.", view.max_connections())
        yield _one("bilm_memory_limit_bytes", "Of the control group or the machine.", memory_limit_bytes())
        yield _count("bilm_log_lines_dropped", "Log lines lost.", view.drops.log_lines())
        yield _count("bilm_alerts_dropped", "Errors that no alert could be sent about.", view.drops.alerts())
        yield _count("bilm_trace_spans_failed", "Spans that the collector didn't take.", view.spans_failed())
        yield _no_log_calls(view.no_log_calls())
        yield from _engines(view.engines())
        yield from _admission(view.admitted())
        if (gpu := view.gpu()) is not None:
            yield from _gpu(gpu)


def _engines(engines: Sequence[EngineView]) -> Iterator[Metric]:
    """Yield the metrics of all engines, a family each."""
    yield _models(engines)
    yield _kernel_paths(engines)
    yield _fallbacks(engines)
    values: dict[str, Callable[[EngineView], float]] = {
        "bilm_engine_stalled_seconds": lambda engine: engine.stalled_s(),
        "bilm_slots": lambda engine: engine.max_rows,
        "bilm_slots_in_use": lambda engine: engine.rows(),
        "bilm_waiting_sentences": lambda engine: engine.waiting_sentences(),
    }
    for name, value in values.items():
        yield _of_each(GaugeMetricFamily(name, _ENGINE_TEXTS[name], labels=["model"]), engines, value)
    yield _by_priority(
        "bilm_priority_waiting_sentences",
        "Sentences that wait for the engine, by priority.",
        engines,
        lambda engine: engine.waiting_by_priority(),
    )
    yield _by_priority(
        "bilm_priority_slots_held",
        "Slots held by sentences, also while rounds leave them out, by priority.",
        engines,
        lambda engine: engine.rows_by_priority(),
    )
    counts: dict[str, Callable[[EngineView], float]] = {
        "bilm_engine_ticks": lambda engine: engine.ticks(),
        "bilm_token_cache_hits": lambda engine: engine.cache()[0],
        "bilm_token_cache_misses": lambda engine: engine.cache()[1],
    }
    for name, value in counts.items():
        yield _of_each(CounterMetricFamily(name, _ENGINE_TEXTS[name], labels=["model"]), engines, value)


def _of_each(
    family: GaugeMetricFamily | CounterMetricFamily, engines: Sequence[EngineView], value: Callable[[EngineView], float]
) -> Metric:
    for engine in engines:
        family.add_metric([engine.model["name"]], value(engine))
    return family


def _by_priority(
    name: str, text: str, engines: Sequence[EngineView], values: Callable[[EngineView], Mapping[str, int]]
) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["model", "priority"])
    for engine in engines:
        for priority, value in values(engine).items():
            family.add_metric([engine.model["name"], priority], value)
    return family


def _models(engines: Sequence[EngineView]) -> Metric:
    family = InfoMetricFamily("bilm_model", "The models served.", labels=_MODEL_LABELS)
    for engine in engines:
        family.add_metric([engine.model[label] for label in _MODEL_LABELS], {})
    return family


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)


def _no_log_calls(counts: Mapping[str, int]) -> Metric:
    found = CounterMetricFamily("bilm_no_log_calls", "Calls kept out of the access log.", labels=["caller"])
    for caller, count in counts.items():
        found.add_metric([caller], count)
    return found


def _fallbacks(engines: Sequence[EngineView]) -> Metric:
    text = "Kernels that didn't compile or work, replaced by something slower."
    family = CounterMetricFamily("bilm_fallbacks", text, labels=["model", "part"])
    for engine in engines:
        for part, count in engine.fallbacks().items():
            family.add_metric([engine.model["name"], part], count)
    return family


def _kernel_paths(engines: Sequence[EngineView]) -> Metric:
    family = GaugeMetricFamily(
        "bilm_kernel_path",
        "1 for the implementation that a part of the engine runs on.",
        labels=["model", "part", "path"],
    )
    for engine in engines:
        for part, path in engine.kernel_paths().items():
            family.add_metric([engine.model["name"], part, path], 1.0)
    return family


def _admission(taken: Mapping[str, Taken]) -> Iterator[Metric]:
    tokens = GaugeMetricFamily(
        "bilm_admitted_tokens", "Tokens of calls not computed, of streams not sent.", labels=["room"]
    )
    token_limit = GaugeMetricFamily("bilm_admitted_tokens_limit", "Their limit.", labels=["room"])
    batch = GaugeMetricFamily("bilm_admitted_batch_tokens", "Those of batch calls and streams.", labels=["room"])
    answers = GaugeMetricFamily("bilm_admitted_answer_bytes", "Bytes of answers not sent.", labels=["room"])
    answer_limit = GaugeMetricFamily("bilm_admitted_answer_bytes_limit", "Their limit.", labels=["room"])
    for room, work in taken.items():
        tokens.add_metric([room], work.tokens)
        token_limit.add_metric([room], work.token_limit)
        batch.add_metric([room], work.batch_tokens)
        answers.add_metric([room], work.response_bytes)
        answer_limit.add_metric([room], work.response_bytes_limit)
    yield from (tokens, token_limit, batch, answers, answer_limit)


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
