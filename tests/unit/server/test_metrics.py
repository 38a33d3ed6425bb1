import logging
import types
from dataclasses import replace
from typing import Any

import grpc
import pytest
from bilm_server.admission import Cost
from bilm_server.calls import CallRecord
from bilm_server.errors import Code
from bilm_server.metrics import METHODS, DropCounts, Metrics, ServerCollector, ServerView, Taken
from bilm_server.resources import Gpu, find_gpu
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

VIEW = ServerView(
    model={"name": "tiny", "version": "abc", "precision": "float32", "backend": "cpu", "tokenizer": "moses-en"},
    kernel_paths=lambda: {"products": "prepacked", "elementwise": "fused"},
    max_rows=128,
    max_connections=lambda: 900,
    serving=lambda: True,
    stalled_s=lambda: 0.0,
    rows=lambda: 3,
    waiting_sentences=lambda: 5,
    cache=lambda: (70, 30),
    ticks=lambda: 11,
    admitted=lambda: {
        "unary": Taken(Cost(10, 1000), Cost(100, 10_000)), "stream": Taken(Cost(20, 2000), Cost(200, 20_000))
    },
    drops=DropCounts(lambda: 1, lambda: 2),
    no_log_calls=lambda: {"team-a": 6},
    spans_failed=lambda: 4,
)  # fmt: skip


def viewed(view: ServerView = VIEW) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(ServerCollector(view))
    return registry


def values(registry: CollectorRegistry) -> dict[str, float]:
    """Samples by name and labels, as they stand in the text."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def a_call(method: str, code: Code | None = Code.OK, **fields: Any) -> CallRecord:
    call = CallRecord(method, "ipv4:127.0.0.1:4711", code=code)
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def test_a_call_is_counted_with_what_it_did() -> None:
    metrics = Metrics()
    call = a_call("Embed", None)
    metrics.begin(call)
    assert values(metrics.registry)["bilm_requests_in_flight{method=Embed}"] == 1
    call.code, call.duration_s = Code.OK, 0.2
    call.computed(tokens=7, queue_s=0.004, inference_s=0.03)
    call.sentence_failed()
    metrics.end(call)
    found = values(metrics.registry)
    assert found["bilm_requests_in_flight{method=Embed}"] == 0
    assert found["bilm_requests_total{code=OK,method=Embed}"] == 1
    assert found["bilm_request_duration_seconds_sum{method=Embed}"] == pytest.approx(0.2)
    assert found["bilm_queue_seconds_bucket{le=0.005,method=Embed}"] == 1
    assert found["bilm_queue_seconds_bucket{le=0.0025,method=Embed}"] == 0
    assert found["bilm_inference_seconds_sum{method=Embed}"] == pytest.approx(0.03)
    assert found["bilm_sentences_total{result=ok}"] == found["bilm_sentences_total{result=failed}"] == 1
    assert found["bilm_tokens_total"] == 7


def test_a_refusal_is_counted_by_its_reason_and_says_nothing_of_queue_and_engine() -> None:
    metrics = Metrics()
    call = a_call("Embed", Code.RESOURCE_EXHAUSTED, reason="OVERLOADED", is_test=True)
    metrics.begin(call)
    metrics.end(call)
    found = values(metrics.registry)
    assert found["bilm_requests_total{code=RESOURCE_EXHAUSTED,method=Embed}"] == 1  # tests are load, too
    assert found["bilm_refusals_total{method=Embed,reason=OVERLOADED}"] == 1
    assert found["bilm_queue_seconds_count{method=Embed}"] == 0


def test_a_call_without_a_code_is_counted() -> None:
    metrics = Metrics()
    metrics.begin(call := a_call("GetModel", None))
    metrics.end(call)
    assert values(metrics.registry)["bilm_requests_total{code=UNKNOWN,method=GetModel}"] == 1


def test_rounds_have_their_rows() -> None:
    metrics = Metrics()
    for rows in (1, 2, 100):
        metrics.round(rows)
    metrics.round(50, failed=True)
    found = values(metrics.registry)
    assert found["bilm_rounds_total{result=ok}"] == found["bilm_round_rows_count"] == 3
    assert found["bilm_rounds_total{result=failed}"] == 1
    assert found["bilm_round_rows_sum"] == 103
    assert found["bilm_round_rows_bucket{le=64.0}"] == 2


def test_what_can_be_alerted_on_is_there_from_the_start() -> None:
    found = values(Metrics().registry)
    for method in METHODS:
        for code in ("OK", "INTERNAL"):
            assert found[f"bilm_requests_total{{code={code},method={method}}}"] == 0


def test_the_view_is_read_at_each_scrape() -> None:
    rows = iter((3, 4))
    registry = viewed(replace(VIEW, rows=lambda: next(rows), serving=lambda: False))
    assert values(registry)["bilm_slots_in_use"] == 3
    found = values(registry)
    assert found["bilm_slots_in_use"] == 4
    assert found["bilm_slots"] == 128
    assert found["bilm_waiting_sentences"] == 5
    assert found["bilm_health_serving"] == 0
    assert found["bilm_connections_limit"] == 900
    assert found["bilm_token_cache_hits_total"] == 70
    assert found["bilm_token_cache_misses_total"] == 30
    assert found["bilm_engine_ticks_total"] == 11
    assert found["bilm_admitted_tokens{room=stream}"] == 20
    assert found["bilm_admitted_tokens_limit{room=unary}"] == 100
    assert found["bilm_admitted_answer_bytes{room=unary}"] == 1000
    assert found["bilm_admitted_answer_bytes_limit{room=stream}"] == 20_000
    assert found["bilm_log_lines_dropped_total"] == 1
    assert found["bilm_alerts_dropped_total"] == 2
    assert found["bilm_trace_spans_failed_total"] == 4
    assert found["bilm_no_log_calls_total{caller=team-a}"] == 6
    model = "{backend=cpu,name=tiny,precision=float32,tokenizer=moses-en,version=abc}"
    assert found[f"bilm_model_info{model}"] == 1
    assert found["bilm_kernel_path{model=tiny,part=products,path=prepacked}"] == 1
    assert found["bilm_kernel_path{model=tiny,part=elementwise,path=fused}"] == 1
    (build,) = (name for name in found if name.startswith("bilm_build_info"))
    assert f"grpcio={grpc.__version__}," in build


def test_the_process_shows_its_descriptors_and_memory() -> None:
    found = values(Metrics().registry)
    if "process_open_fds" not in found:
        pytest.skip("needs /proc")
    assert 0 < found["process_open_fds"] < found["process_max_fds"]
    assert 0 < found["process_resident_memory_bytes"] < values(viewed())["bilm_memory_limit_bytes"]


def test_registries_are_apart() -> None:
    first, second = Metrics(), Metrics()
    first.round(1)
    assert values(second.registry)["bilm_rounds_total{result=ok}"] == 0


# ---- the machine ----


class Nvml(types.SimpleNamespace):
    class NVMLError(Exception):
        pass

    failing = False

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> object:  # noqa: N802
        if self.failing:
            raise self.NVMLError("GPU is lost")
        return types.SimpleNamespace(used=10, total=100)

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> object:  # noqa: N802
        return types.SimpleNamespace(gpu=35)


def test_the_gpu_is_shown_as_long_as_the_driver_answers(caplog: pytest.LogCaptureFixture) -> None:
    nvml = Nvml()
    registry = viewed(replace(VIEW, gpu=Gpu(nvml, "handle")))
    found = values(registry)
    assert found["bilm_gpu_memory_used_bytes"] == 10
    assert found["bilm_gpu_memory_bytes"] == 100
    assert found["bilm_gpu_busy_ratio"] == 0.35
    nvml.failing = True
    for _ in range(3):
        assert "bilm_gpu_busy_ratio" not in values(registry)
    assert [record.getMessage() for record in caplog.records] == ["NVML has no figures of the GPU: GPU is lost"]
    nvml.failing = False
    assert "bilm_gpu_busy_ratio" in values(registry)


def test_without_a_driver_there_is_no_gpu(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    assert find_gpu("00000000-0000-0000-0000-000000000000") is None
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert find_gpu("00000000-0000-0000-0000-000000000000") is None
    assert all(record.getMessage().startswith("no metrics of the GPU: ") for record in caplog.records)
    assert len(caplog.records) == 2
