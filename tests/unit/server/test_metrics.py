import itertools
import logging
import types
import weakref
from dataclasses import replace
from typing import Any

import grpc
import pytest
from bilm_api.constants import Priority
from bilm_server.errors import Code
from bilm_server.observability.call_record import CallRecord
from bilm_server.observability.metrics import METHODS, NO_MODEL, Metrics
from bilm_server.observability.resources import Gpu, find_gpu
from bilm_server.observability.server_metrics import DropCounts, EngineView, ServerCollector, ServerView, Taken
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

ENGINE = EngineView(
    model={"name": "tiny", "version": "abc", "precision": "float32", "backend": "cpu", "tokenizer": "moses-en"},
    kernel_paths=lambda: {"products": "prepacked", "elementwise": "fused"},
    fallbacks=lambda: {"results": 2},
    max_rows=128,
    stalled_s=lambda: 0.5,
    rows=lambda: 3,
    waiting_sentences=lambda: 5,
    waiting_by_priority=lambda: {"interactive": 1, "batch": 4},
    rows_by_priority=lambda: {"interactive": 2, "batch": 7},
    cache=lambda: (70, 30),
    ticks=lambda: 11,
)
VIEW = ServerView(
    engines=lambda: [ENGINE],
    max_connections=lambda: 900,
    serving=lambda: False,
    admitted=lambda: {
        "unary": Taken(10, 100, 1000, 10_000, 4), "stream": Taken(20, 200, 2000, 20_000, 0)
    },
    drops=DropCounts(lambda: 1, lambda: 2),
    no_log_calls=lambda: {"team-a": 6},
    spans_failed=lambda: 4,
)  # fmt: skip


def new_metrics() -> Metrics:
    return Metrics(["tiny"])


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
    metrics = new_metrics()
    call = a_call("Embed", None)
    metrics.begin(call)
    assert values(metrics.registry)["bilm_requests_in_flight{method=Embed,model=}"] == 1
    call.model = "tiny"  # known a little later
    found = values(metrics.registry)
    assert found["bilm_requests_in_flight{method=Embed,model=tiny}"] == 1
    assert found["bilm_requests_in_flight{method=Embed,model=}"] == 0
    call.code, call.duration_s = Code.OK, 0.2
    call.computed(tokens=7, queue_s=0.004, inference_s=0.03)
    call.sentence_failed()
    metrics.end(call)
    found = values(metrics.registry)
    assert found["bilm_requests_in_flight{method=Embed,model=tiny}"] == 0
    assert found["bilm_requests_total{code=OK,method=Embed,model=tiny}"] == 1
    assert found["bilm_request_duration_seconds_sum{method=Embed,model=tiny}"] == pytest.approx(0.2)
    assert found["bilm_queue_seconds_bucket{le=0.005,method=Embed,model=tiny}"] == 1
    assert found["bilm_queue_seconds_bucket{le=0.0025,method=Embed,model=tiny}"] == 0
    assert found["bilm_inference_seconds_sum{method=Embed,model=tiny}"] == pytest.approx(0.03)
    assert found["bilm_sentences_total{model=tiny,result=ok}"] == 1
    assert found["bilm_sentences_total{model=tiny,result=failed}"] == 1
    assert found["bilm_tokens_total{model=tiny}"] == 7


def test_batch_calls_count_among_all_and_by_themselves() -> None:
    metrics = new_metrics()
    for priority in (Priority.INTERACTIVE, Priority.BATCH, Priority.BATCH):
        call = a_call("Embed", model="tiny", priority=priority)
        call.computed(tokens=7, queue_s=0.004, inference_s=0.03)
        metrics.end(call)
        metrics.end(a_call("Embed", Code.RESOURCE_EXHAUSTED, model="tiny", reason="OVERLOADED", priority=priority))
    found = values(metrics.registry)
    for name, expected in (("", 3), ("batch_", 2)):
        assert found[f"bilm_{name}queue_seconds_count{{method=Embed,model=tiny}}"] == expected
        assert found[f"bilm_{name}refusals_total{{method=Embed,model=tiny,reason=OVERLOADED}}"] == expected


def test_what_is_not_scraped_is_counted_all_the_same_and_not_kept() -> None:
    metrics, n = new_metrics(), 1000
    call = a_call("Embed", model="tiny")
    kept = weakref.ref(call)
    for _ in range(n):
        metrics.begin(call)
        metrics.end(call)
        metrics.round("tiny", 3)
        call = a_call("Embed", model="tiny")
    assert kept() is None
    found = values(metrics.registry)
    assert found["bilm_requests_total{code=OK,method=Embed,model=tiny}"] == n
    assert found["bilm_round_rows_sum{model=tiny}"] == 3 * n


def test_a_refusal_is_counted_by_its_reason_and_says_nothing_of_queue_and_engine() -> None:
    metrics = new_metrics()
    call = a_call("Embed", Code.RESOURCE_EXHAUSTED, reason="OVERLOADED", is_test=True, model="tiny")
    metrics.begin(call)
    metrics.end(call)
    found = values(metrics.registry)
    # tests are load, too
    assert found["bilm_requests_total{code=RESOURCE_EXHAUSTED,method=Embed,model=tiny}"] == 1
    assert found["bilm_refusals_total{method=Embed,model=tiny,reason=OVERLOADED}"] == 1
    assert found["bilm_queue_seconds_count{method=Embed,model=tiny}"] == 0


def test_a_call_for_a_model_that_is_not_served_has_an_empty_label() -> None:
    metrics = new_metrics()
    metrics.begin(call := a_call("Embed", Code.NOT_FOUND, reason="MODEL_NOT_FOUND"))
    metrics.end(call)
    found = values(metrics.registry)
    assert found["bilm_requests_total{code=NOT_FOUND,method=Embed,model=}"] == 1
    assert found["bilm_refusals_total{method=Embed,model=,reason=MODEL_NOT_FOUND}"] == 1


def test_a_call_without_a_code_is_counted() -> None:
    metrics = new_metrics()
    metrics.begin(call := a_call("GetModel", None))
    metrics.end(call)
    assert values(metrics.registry)["bilm_requests_total{code=UNKNOWN,method=GetModel,model=}"] == 1


def test_a_method_that_was_in_flight_at_a_scrape_is_shown_with_0_later() -> None:
    metrics = new_metrics()
    metrics.begin(call := a_call("unknown", Code.UNIMPLEMENTED))
    assert values(metrics.registry)["bilm_requests_in_flight{method=unknown,model=}"] == 1
    metrics.end(call)
    assert values(metrics.registry)["bilm_requests_in_flight{method=unknown,model=}"] == 0


def test_rounds_have_their_rows() -> None:
    metrics = new_metrics()
    for rows in (1, 2, 100):
        metrics.round("tiny", rows)
    metrics.round("tiny", 50, failed=True)
    found = values(metrics.registry)
    assert found["bilm_rounds_total{model=tiny,result=ok}"] == found["bilm_round_rows_count{model=tiny}"] == 3
    assert found["bilm_rounds_total{model=tiny,result=failed}"] == 1
    assert found["bilm_round_rows_sum{model=tiny}"] == 103
    assert found["bilm_round_rows_bucket{le=64.0,model=tiny}"] == 2


def test_what_can_be_alerted_on_is_there_from_the_start() -> None:
    found = values(new_metrics().registry)
    for method, model, code in itertools.product(METHODS, ("tiny", NO_MODEL), ("OK", "INTERNAL")):
        assert found[f"bilm_requests_total{{code={code},method={method},model={model}}}"] == 0


def test_the_view_is_read_at_each_scrape() -> None:
    rows = iter((3, 4))
    registry = viewed(replace(VIEW, engines=lambda: [replace(ENGINE, rows=lambda: next(rows))]))
    assert values(registry)["bilm_slots_in_use{model=tiny}"] == 3
    found = values(registry)
    assert found["bilm_slots_in_use{model=tiny}"] == 4
    assert found["bilm_slots{model=tiny}"] == 128
    assert found["bilm_waiting_sentences{model=tiny}"] == 5
    assert found["bilm_engine_stalled_seconds{model=tiny}"] == 0.5
    assert found["bilm_token_cache_hits_total{model=tiny}"] == 70
    assert found["bilm_token_cache_misses_total{model=tiny}"] == 30
    assert found["bilm_engine_ticks_total{model=tiny}"] == 11
    assert found["bilm_health_serving"] == 0
    assert found["bilm_connections_limit"] == 900
    assert found["bilm_admitted_tokens{room=stream}"] == 20
    assert found["bilm_admitted_tokens_limit{room=unary}"] == 100
    assert found["bilm_admitted_answer_bytes{room=unary}"] == 1000
    assert found["bilm_admitted_answer_bytes_limit{room=stream}"] == 20_000
    assert found["bilm_log_lines_dropped_total"] == 1
    assert found["bilm_alerts_dropped_total"] == 2
    assert found["bilm_trace_spans_failed_total"] == 4
    assert found["bilm_no_log_calls_total{caller=team-a}"] == 6
    assert found["bilm_fallbacks_total{model=tiny,part=results}"] == 2
    model = "{backend=cpu,name=tiny,precision=float32,tokenizer=moses-en,version=abc}"
    assert found[f"bilm_model_info{model}"] == 1
    assert found["bilm_kernel_path{model=tiny,part=products,path=prepacked}"] == 1
    assert found["bilm_kernel_path{model=tiny,part=elementwise,path=fused}"] == 1
    (build,) = (name for name in found if name.startswith("bilm_build_info"))
    assert f"grpcio={grpc.__version__}," in build


def test_each_model_has_series_of_its_own() -> None:
    other = replace(ENGINE, model={**ENGINE.model, "name": "large"}, rows=lambda: 9)
    found = values(viewed(replace(VIEW, engines=lambda: [ENGINE, other])))
    assert (found["bilm_slots_in_use{model=tiny}"], found["bilm_slots_in_use{model=large}"]) == (3, 9)


def test_the_process_shows_its_descriptors_and_memory() -> None:
    found = values(new_metrics().registry)
    if "process_open_fds" not in found:
        pytest.skip("needs /proc")
    assert 0 < found["process_open_fds"] < found["process_max_fds"]
    assert 0 < found["process_resident_memory_bytes"] < values(viewed())["bilm_memory_limit_bytes"]


def test_registries_are_apart() -> None:
    first, second = new_metrics(), new_metrics()
    first.round("tiny", 1)
    assert values(second.registry)["bilm_rounds_total{model=tiny,result=ok}"] == 0


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
    gpu = Gpu(nvml, "handle")
    registry = viewed(replace(VIEW, gpu=lambda: gpu))
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


def without_the_package(name: str) -> Any:
    raise ImportError(name)


def test_without_a_driver_there_is_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert find_gpu("00000000-0000-0000-0000-000000000000") is None
    assert find_gpu("00000000-0000-0000-0000-000000000000", without_the_package) is None
    assert all(record.getMessage().startswith("no metrics of the GPU: ") for record in caplog.records)
    assert len(caplog.records) == 2
