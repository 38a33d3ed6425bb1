import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from bilm_server.errors import Code
from bilm_server.observability.call_record import UNKNOWN_METHOD, CallRecord

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra `trace`")

from bilm_server.observability.tracing import Tracing, start_tracing
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

SERVICE = "bilm_api.v1.EmbedService"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.refuse, self.entered, self.answer = False, threading.Event(), threading.Event()
        self.answer.set()
        self._server = grpc.server(ThreadPoolExecutor(4))
        register: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server  # it has no types
        register(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - of the contract
        self.entered.set()
        self.answer.wait()
        if self.refuse:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return trace_service_pb2.ExportTraceServiceResponse()

    def stop(self) -> None:
        self.answer.set()
        self._server.stop(0).wait()

    @property
    def spans(self) -> dict[str, trace_pb2.Span]:
        """By name; `tracing` must have been stopped."""
        found = [s for r in self.requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture
def traced(collector: Collector) -> Iterator[Tracing]:
    tracing = start_tracing(collector.endpoint, 1.0, SERVICE, "127.0.0.1:50051")
    yield tracing
    tracing.stop()


def a_call(method: str = "Embed", traceparent: str = "", **fields: Any) -> CallRecord:
    metadata = (("traceparent", traceparent),) if traceparent else ()
    call = CallRecord(method, "ipv4:127.0.0.1:4711", metadata, code=Code.OK)
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def run(tracing: Tracing, call: CallRecord) -> str:
    tracing.begin(call)
    trace_id = tracing.trace_id(call)
    tracing.end(call)
    return trace_id


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_call_is_a_span_of_the_callers_trace_with_its_parts(collector: Collector, traced: Tracing) -> None:
    call = a_call(traceparent=SAMPLED, duration_s=0.1, caller="batch")
    call.metadata = (*call.metadata, ("tracestate", "a=1"), ("tracestate", "b=2"), ("other-bin", b"x"))
    call.computed(tokens=7, queue_s=0.01, inference_s=0.05)
    call.sentence_failed()
    before_ns = time.time_ns()
    assert run(traced, call) == TRACE
    traced.stop()
    spans = collector.spans
    assert set(spans) == {f"{SERVICE}/Embed", "queue", "inference"}
    span = spans[f"{SERVICE}/Embed"]
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "a=1,b=2")
    assert span.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert span.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert 0 <= span.start_time_unix_nano - before_ns < 60 * 10**9
    assert span.end_time_unix_nano - span.start_time_unix_nano == 100_000_000
    assert attributes(span) == {
        "rpc.system.name": "grpc", "rpc.method": f"{SERVICE}/Embed", "rpc.response.status_code": "OK",
        "client.address": "127.0.0.1", "client.port": 4711, "bilm.sentences": 2, "bilm.failed_sentences": 1,
        "bilm.tokens": 7, "bilm.queue_seconds": 0.01, "bilm.inference_seconds": 0.05, "bilm.caller": "batch",
        "bilm.test": False,
    }  # fmt: skip
    queue, inference = spans["queue"], spans["inference"]
    assert queue.parent_span_id == inference.parent_span_id == span.span_id
    assert queue.trace_id == inference.trace_id == span.trace_id
    assert queue.start_time_unix_nano == span.start_time_unix_nano
    assert inference.start_time_unix_nano == queue.end_time_unix_nano == queue.start_time_unix_nano + 10_000_000
    assert inference.end_time_unix_nano == inference.start_time_unix_nano + 50_000_000


def test_the_server_names_itself(collector: Collector, traced: Tracing) -> None:
    run(traced, a_call())
    traced.stop()
    found = attributes(collector.requests[0].resource_spans[0].resource)
    assert found["service.name"] == "bilm-serve"
    assert found["service.instance.id"] == "127.0.0.1:50051"
    assert found["service.version"]


def test_calls_are_named_by_their_own_service_and_those_that_do_not_exist_by_none(
    collector: Collector, traced: Tracing
) -> None:
    for method in ("Embed", "other.v1.Other/Call", UNKNOWN_METHOD):
        run(traced, a_call(method, request_id="r-1"))
    traced.stop()
    assert set(collector.spans) == {f"{SERVICE}/Embed", "other.v1.Other/Call", UNKNOWN_METHOD}
    assert {attributes(span)["bilm.request_id"] for span in collector.spans.values()} == {"r-1"}


def test_parts_never_leave_their_call(collector: Collector, traced: Tracing) -> None:
    """The longest wait and the longest time in the engine may be of different sentences."""
    call = a_call(duration_s=0.1)
    call.computed(1, queue_s=0.08, inference_s=0.01)
    call.computed(1, queue_s=0.01, inference_s=0.08)
    run(traced, call)
    traced.stop()
    spans = collector.spans
    assert spans["inference"].end_time_unix_nano == spans[f"{SERVICE}/Embed"].end_time_unix_nano


def test_a_stream_and_a_refused_call_have_no_parts(collector: Collector, traced: Tracing) -> None:
    stream = a_call("EmbedStream", duration_s=1.0)
    stream.computed(1, 0.1, 0.1)
    run(traced, stream)
    run(traced, a_call(code=Code.RESOURCE_EXHAUSTED, reason="OVERLOADED"))
    traced.stop()
    assert set(collector.spans) == {f"{SERVICE}/EmbedStream", f"{SERVICE}/Embed"}
    refused = collector.spans[f"{SERVICE}/Embed"]
    assert refused.status.code == trace_pb2.Status.STATUS_CODE_UNSET  # the caller's error
    assert attributes(refused)["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert attributes(refused)["bilm.reason"] == "OVERLOADED"


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNAVAILABLE])
def test_the_servers_errors_are_errors(collector: Collector, traced: Tracing, code: Code) -> None:
    run(traced, a_call(code=code))
    traced.stop()
    span = collector.spans[f"{SERVICE}/Embed"]
    assert span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert attributes(span)["error.type"] == code.name


def test_calls_at_the_same_time_stay_apart(collector: Collector, traced: Tracing) -> None:
    first, second = a_call("Embed", SAMPLED), a_call("GetModel")
    traced.begin(first)
    traced.begin(second)
    assert traced.trace_id(first) == TRACE != traced.trace_id(second)
    traced.end(first)
    traced.end(second)
    assert traced.trace_id(first) == ""
    traced.stop()
    assert collector.spans[f"{SERVICE}/GetModel"].parent_span_id == b""


def test_the_callers_decision_goes_before_the_ratio(collector: Collector) -> None:
    never = start_tracing(collector.endpoint, 0.0, SERVICE, "x")
    assert run(never, a_call("GetModel")) != ""
    assert run(never, a_call("Embed", SAMPLED)) == TRACE
    never.stop()
    assert set(collector.spans) == {f"{SERVICE}/Embed"}


def test_what_the_caller_decided_against_is_not_sent(collector: Collector, traced: Tracing) -> None:
    assert run(traced, a_call("Embed", UNSAMPLED)) == TRACE  # for the access log
    traced.stop()
    assert collector.requests == []


@pytest.mark.parametrize(
    "metadata",
    [
        (("traceparent", "garbage"),),
        (("traceparent", SAMPLED), ("traceparent", SAMPLED.replace("01", "02"))),
        (("traceparent", SAMPLED.encode()),),
        (("traceparent", "x" * 100_000), ("tracestate", "y" * 100_000)),
        (("traceparent", f"00-{'0' * 32}-{PARENT}-01"),),
    ],
)
def test_a_context_that_cannot_be_read_is_none(collector: Collector, traced: Tracing, metadata: Any) -> None:
    call = a_call()
    call.metadata = metadata
    run(traced, call)
    traced.stop()
    span = collector.spans[f"{SERVICE}/Embed"]
    assert span.parent_span_id == b""
    assert span.trace_id.hex() != TRACE


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv6:%5B::1%5D:4711", {"client.address": "::1", "client.port": 4711}),
        ("unix:/run/bilm.sock", {"client.address": "unix:/run/bilm.sock"}),
        ("unix:", {"client.address": "unix:"}),
        ("", {"client.address": ""}),
    ],
)
def test_peers(collector: Collector, traced: Tracing, peer: str, expected: dict[str, Any]) -> None:
    run(traced, a_call(peer=peer))
    traced.stop()
    found = attributes(collector.spans[f"{SERVICE}/Embed"])
    assert {key: value for key, value in found.items() if key.startswith("client.")} == expected


def test_what_the_environment_adds_holds(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=1234")
    traced = start_tracing(collector.endpoint, 1.0, SERVICE, "x")
    run(traced, a_call())
    traced.stop()
    assert collector.metadata[0]["api-key"] == "1234"


def test_a_collector_of_this_machine_is_reached_without_a_proxy(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    traced = start_tracing(collector.endpoint, 1.0, SERVICE, "x")
    run(traced, a_call())
    traced.stop()
    assert set(collector.spans) == {f"{SERVICE}/Embed"}


# ---- a collector that fails ----


def test_spans_that_the_collector_refuses_are_counted(collector: Collector, traced: Tracing) -> None:
    collector.refuse = True
    for _ in range(3):
        run(traced, a_call())
    traced.stop()
    assert traced.failed == 3


@pytest.mark.parametrize("kind", ["dead", "hangs"])
def test_a_broken_collector_holds_nobody(collector: Collector, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    if kind == "dead":
        collector.stop()
    collector.answer.clear()
    # An export takes so long that whoever waits for it hangs
    traced = start_tracing(collector.endpoint, 1.0, SERVICE, "x", export_timeout_s=3600, stop_timeout_s=0.3)
    for _ in range(5000):  # more than the queue holds
        run(traced, a_call())
    assert kind == "dead" or collector.entered.wait(60)
    traced.stop()


def test_without_the_extra_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["opentelemetry.sdk"] = None
from bilm_server.errors import ConfigurationError
try:
    import bilm_server.observability.tracing
except ConfigurationError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=240)
    assert found.stdout == "trace_endpoint: needs the extra `trace`: pip install 'bilm-serve[trace]'\n"
