"""Traces: a span a call, under the caller's W3C context, sent to an OTLP collector.

To be imported only where traces are wanted: it needs the extra `trace`, and raises a ConfigurationError without it.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import unquote

from bilm_system.proxies import WITHOUT_PROXY, is_local_url

import bilm_server
from bilm_server.errors import Code, ConfigurationError
from bilm_server.observability.call_record import UNKNOWN_METHOD, CallRecord

try:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as missing:
    raise ConfigurationError("trace_endpoint: needs the extra `trace`: pip install 'bilm-serve[trace]'") from missing

Attributes = dict[str, str | int | float | bool]

_NS = 1_000_000_000
_EXPORT_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0

# By OpenTelemetry's conventions; all others are the caller's errors, which leave a server's span as it is
_SERVER_ERRORS: Final = frozenset(
    {
        Code.UNKNOWN,
        Code.DEADLINE_EXCEEDED,
        Code.UNIMPLEMENTED,
        Code.INTERNAL,
        Code.UNAVAILABLE,
        Code.DATA_LOSS,
    }
)


class Tracing:
    """Makes a span of every call that is sampled (`CallObserver`).

    A call that embeds and isn't a stream has two children, queue and inference: the longest of its sentences' times,
    one after the other from the call's begin. In a stream such times have no place; they are attributes of its span
    only.
    """

    def __init__(
        self,
        service: str,
        provider: TracerProvider,
        exporter: "CountingExporter",
        stop_timeout_s: float = _STOP_TIMEOUT_S,
    ) -> None:
        """Keep the parts, which `start_tracing` makes.

        Args:
            service: full name of the gRPC service.
            provider: makes spans.
            exporter: sends them.
            stop_timeout_s: for what is left to be sent at the end.
        """
        self._service, self._provider, self._exporter = service, provider, exporter
        self._stop_timeout_s = stop_timeout_s
        self._tracer = provider.get_tracer("bilm_server", bilm_server.__version__)
        self._propagator = TraceContextTextMapPropagator()
        self._spans: dict[CallRecord, tuple[Span, int]] = {}

    @property
    def failed(self) -> int:
        """Spans that the collector didn't take; for the metrics."""
        return self._exporter.failed

    def trace_id(self, call: CallRecord) -> str:
        """Return the trace that an open call belongs to; for its line in the access log."""
        if call not in self._spans:
            return ""
        return f"{self._spans[call][0].get_span_context().trace_id:032x}"

    def begin(self, call: CallRecord) -> None:
        """Start the span."""
        own = call.method != UNKNOWN_METHOD and "/" not in call.method
        name = f"{self._service}/{call.method}" if own else call.method
        attributes: Attributes = {"rpc.system.name": _system(call), "rpc.method": name, **_client(call.peer)}
        begun_ns = time.time_ns()
        span = self._tracer.start_span(
            name, self._propagator.extract(_carrier(call)), SpanKind.SERVER, attributes, start_time=begun_ns
        )
        self._spans[call] = (span, begun_ns)

    def end(self, call: CallRecord) -> None:
        """End the span."""
        span, begun_ns = self._spans.pop(call)
        end_ns = begun_ns + round(call.duration_s * _NS)  # the wall clock may have jumped meanwhile
        if span.is_recording():
            span.set_attributes(_outcome(call))
            if call.code in _SERVER_ERRORS:
                span.set_status(StatusCode.ERROR)
            if call.method != "EmbedStream" and call.sentences > call.failed_sentences:
                self._add_children(span, call, begun_ns, end_ns)
        span.end(end_ns)

    def _add_children(self, parent: Span, call: CallRecord, begun_ns: int, end_ns: int) -> None:
        joined_ns = min(end_ns, begun_ns + round(call.queue_s * _NS))
        done_ns = min(end_ns, joined_ns + round(call.inference_s * _NS))
        context = set_span_in_context(parent)
        for name, start_ns, stop_ns in (("queue", begun_ns, joined_ns), ("inference", joined_ns, done_ns)):
            self._tracer.start_span(name, context, start_time=start_ns).end(stop_ns)

    def stop(self) -> None:
        """Send what there is; blocks for twice the time limit at most."""
        sending = threading.Thread(target=self._provider.shutdown, name="tracing-stop", daemon=True)
        sending.start()
        sending.join(self._stop_timeout_s)
        if sending.is_alive():
            self._exporter.shutdown()  # gives up what it is trying
            sending.join(self._stop_timeout_s)


class CountingExporter(OTLPSpanExporter):
    """Sends spans, and counts those that the collector doesn't take.

    Attributes:
        failed: their number.
    """

    failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Part of OpenTelemetry's interface."""
        result = super().export(spans)
        if result is not SpanExportResult.SUCCESS:
            self.failed += len(spans)
        return result


def start_tracing(
    endpoint: str,
    sample_ratio: float,
    service: str,
    instance: str,
    *,
    export_timeout_s: float = _EXPORT_TIMEOUT_S,
    stop_timeout_s: float = _STOP_TIMEOUT_S,
) -> Tracing:
    """Start to collect spans and to send them, in a thread.

    What OpenTelemetry reads from the environment beside the endpoint (OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE, …,
    OTEL_RESOURCE_ATTRIBUTES) holds.

    Args:
        endpoint: of an OTLP collector over gRPC, http:// or https://.
        sample_ratio: share of the calls that are traced where the caller's context doesn't say.
        service: full name of the gRPC service.
        instance: which server this is.
        export_timeout_s: for the collector to take spans.
        stop_timeout_s: for what is left to be sent at the end.
    """
    options: Any = tuple(WITHOUT_PROXY) if is_local_url(endpoint) else ()  # numbers too, whatever its annotation says
    exporter = CountingExporter(endpoint=endpoint, timeout=export_timeout_s, channel_options=options)
    identity = {
        "service.name": "bilm-serve",
        "service.version": bilm_server.__version__,
        "service.instance.id": instance,
    }
    sampler = ParentBased(TraceIdRatioBased(sample_ratio))
    provider = TracerProvider(sampler, Resource.create(identity), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(service, provider, exporter, stop_timeout_s)


def _carrier(call: CallRecord) -> dict[str, str]:
    """Return the W3C context among the metadata; the client may have sent `tracestate` in several pieces."""
    texts = [(key, value) for key, value in call.metadata if isinstance(value, str)]
    parents = [value for key, value in texts if key == "traceparent"]
    states = [value for key, value in texts if key == "tracestate"]
    return {"traceparent": parents[0], "tracestate": ",".join(states)} if len(parents) == 1 else {}


def _system(call: CallRecord) -> str:
    return "http" if call.method.startswith("http/") else "grpc"


def _client(peer: str) -> Attributes:
    """Return a peer ("ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "unix:…") in OpenTelemetry's words."""
    kind, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return {"client.address": peer}
    return {"client.address": host.strip("[]"), "client.port": int(port)}


def _outcome(call: CallRecord) -> Attributes:
    code = call.code or Code.UNKNOWN
    attributes: Attributes = {
        "rpc.response.status_code": code,
        "bilm.sentences": call.sentences,
        "bilm.failed_sentences": call.failed_sentences,
        "bilm.tokens": call.tokens,
        "bilm.queue_seconds": call.queue_s,
        "bilm.inference_seconds": call.inference_s,
        "bilm.caller": call.caller,
        "bilm.test": call.is_test,
    }
    if call.reason:
        attributes["bilm.reason"] = call.reason
    if call.request_id:
        attributes["bilm.request_id"] = call.request_id
    if call.code in _SERVER_ERRORS:
        attributes["error.type"] = code
    return attributes
