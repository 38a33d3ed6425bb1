"""Metrics for Prometheus: what is counted as calls and rounds come and go."""

from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import TypeVar

from bilm_api.constants import Priority
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from bilm_server.errors import Code
from bilm_server.observability.call_record import CallRecord

T = TypeVar("T")
M = TypeVar("M", Counter, Histogram)
Series = Callable[..., M]
"""Returns a metric's series of given label values. Kept, as the client library's own look-up costs as much as counting;
that keeps each series, too, so this takes no memory beside it."""

EMBEDDING_METHODS = ("Embed", "EmbedStream")
METHODS = (*EMBEDDING_METHODS, "GetModel", "ListModels")
NO_MODEL = ""
"""Label of calls that name no model that is served, and of those that end before that is known."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BACKLOG = 64
"""Calls, and rounds, after which they are counted without a scrape."""
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counts calls and rounds in its own registry; sees every call (`CallObserver`).

    Calls marked as tests count like any others: load is load.
    """

    def __init__(self, models: Sequence[str], infer_methods: Sequence[str] = ()) -> None:
        """Name the metrics.

        Args:
            models: names of those that are served.
            infer_methods: names of other protocols' methods that embed.
        """
        self.registry = CollectorRegistry()
        self._backlog = _Backlog(self._count)
        self.registry.register(self._backlog)
        self._embedding = (*EMBEDDING_METHODS, *infer_methods)
        self._methods = (*METHODS, *infer_methods)
        self._requests = self._counter("requests", "Calls ended.", "method", "code", "model")
        self._refusals = self._counter("refusals", "Calls refused as a whole, by reason.", "method", "reason", "model")
        refused = "Batch calls refused as a whole, by reason."
        self._batch_refusals = self._counter("batch_refusals", refused, "method", "reason", "model")
        self._durations = self._seconds("request_duration_seconds", "From begin to end of a call.")
        self._queue = self._seconds("queue_seconds", "Longest wait of a call's sentences for the engine.")
        self._batch_queue = self._seconds("batch_queue_seconds", "The same, of batch calls alone.")
        self._inference = self._seconds("inference_seconds", "Longest time of a call's sentences in it.")
        answered = "Sentences answered, with a result or an error."
        self._sentences = self._counter("sentences", answered, "result", "model")
        self._tokens = self._counter("tokens", "Tokens of sentences computed.", "model")
        self._rounds = self._counter("rounds", "Rounds of the engine.", "result", "model")
        self._rows: Series[Histogram] = cache(
            Histogram(
                "bilm_round_rows", "Sentences in a round.", ["model"], buckets=_ROWS, registry=self.registry
            ).labels
        )
        self._open = _OpenCalls(self._methods)
        self._show_zeros((*models, NO_MODEL))
        self.registry.register(self._open)
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> "Series[Counter]":
        return cache(Counter(f"bilm_{name}", text, labels, registry=self.registry).labels)

    def _seconds(self, name: str, text: str) -> "Series[Histogram]":
        names = ["method", "model"]
        return cache(Histogram(f"bilm_{name}", text, names, buckets=_SECONDS, registry=self.registry).labels)

    def add_models(self, models: Sequence[str]) -> None:
        """Take the names of the models that are served now; the series of others stay, as counters do."""
        self._show_zeros(models)

    def _show_zeros(self, models: Sequence[str]) -> None:
        """Make series before their first event: Prometheus sees no increase in a series that appears with it."""
        for model in models:
            for method in self._methods:
                self._durations(method, model)
                for code in (Code.OK, Code.INTERNAL, Code.UNAVAILABLE):
                    self._requests(method, code, model)
            for method in self._embedding:
                self._refusals(method, "OVERLOADED", model)
                self._batch_refusals(method, "OVERLOADED", model)
        self._open.show(models)
        for model in models:
            if model == NO_MODEL:
                continue
            for method in self._embedding:
                self._queue(method, model)
                self._batch_queue(method, model)
                self._inference(method, model)
            for result in ("ok", "failed"):
                self._sentences(result, model)
                self._rounds(result, model)
            self._tokens(model)
            self._rows(model)

    # ---- on the event loop ----

    def begin(self, call: CallRecord) -> None:
        """Count a call in."""
        self._open.calls.add(call)

    def end(self, call: CallRecord) -> None:
        """Count a call out, and what it did."""
        self._open.calls.discard(call)
        self._backlog.ended.append(call)
        if len(self._backlog.ended) >= _BACKLOG:
            self._count()

    # ---- in the inference thread ----

    def round(self, model: str, rows: int, failed: bool = False) -> None:
        """Count a round of a model's engine; only those that succeed have their rows counted."""
        self._backlog.rounds.append((model, rows, failed))
        if len(self._backlog.rounds) >= _BACKLOG:
            self._count()

    # ---- in any thread ----

    def _count(self) -> None:
        """Count what has happened."""
        for call in _popped(self._backlog.ended):
            self._count_call(call)
        for model, rows, failed in _popped(self._backlog.rounds):
            self._rounds("failed" if failed else "ok", model).inc()
            if not failed:
                self._rows(model).observe(rows)

    def _count_call(self, call: CallRecord) -> None:
        method, model, is_batch = call.method, call.model, call.priority is Priority.BATCH
        self._requests(method, call.code or Code.UNKNOWN, model).inc()
        self._durations(method, model).observe(call.duration_s)
        if call.reason:
            self._refusals(method, call.reason, model).inc()
            if is_batch:
                self._batch_refusals(method, call.reason, model).inc()
        n_computed = call.sentences - call.failed_sentences
        if n_computed:
            self._queue(method, model).observe(call.queue_s)
            if is_batch:
                self._batch_queue(method, model).observe(call.queue_s)
            self._inference(method, model).observe(call.inference_s)
            self._sentences("ok", model).inc(n_computed)
            self._tokens(model).inc(call.tokens)
        if call.failed_sentences:
            self._sentences("failed", model).inc(call.failed_sentences)


class _Backlog(Collector):
    """Calls and rounds that aren't counted yet: at once while a call is answered, counting takes several times as long.

    Registered before all other collectors, it has them counted at the beginning of a scrape.
    """

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count
        self.ended: deque[CallRecord] = deque()
        self.rounds: deque[tuple[str, int, bool]] = deque()

    def collect(self) -> Iterator[Metric]:
        """Count, and yield nothing."""
        self._count()
        yield from ()


def _popped(queue: deque[T]) -> Iterator[T]:
    """Yield what a queue holds; each item once, whichever threads do so."""
    with suppress(IndexError):
        while True:
            yield queue.popleft()


class _OpenCalls(Collector):
    """Calls begun and not ended, counted at each scrape: a call's model is known only some time after its begin."""

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods, self._shown = methods, set[tuple[str, str]]()
        self.calls: set[CallRecord] = set()

    def show(self, models: Sequence[str]) -> None:
        """Show these models, at 0 while they have no calls."""
        self._shown = self._shown | {(method, model) for method in self._methods for model in models}

    def collect(self) -> Iterator[Metric]:
        """Yield the gauge; labels that a scrape has shown stay, at 0."""
        counts = Counts((call.method, call.model) for call in self.calls.copy())
        self._shown = self._shown | counts.keys()
        family = GaugeMetricFamily("bilm_requests_in_flight", "Calls begun and not ended.", labels=["method", "model"])
        for labels in sorted(self._shown):
            family.add_metric(labels, counts[labels])
        yield family
