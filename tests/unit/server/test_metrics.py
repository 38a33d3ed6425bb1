import asyncio
import logging
import select
import socket
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_server.admission import Cost
from bilm_server.calls import CallRecord
from bilm_server.config import split_address
from bilm_server.metrics import METHODS, Metrics, ServerView, Taken
from bilm_server.metrics_http import MetricsExporter
from bilm_server.resources import Gpu, find_gpu
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

VIEW = ServerView(
    model={"name": "tiny", "version": "abc", "precision": "float32", "backend": "cpu", "tokenizer": "moses-en"},
    kernel_paths=lambda: {"products": "prepacked", "elementwise": "fused"},
    max_rows=128,
    max_connections=900,
    serving=lambda: True,
    stalled_s=lambda: 0.0,
    rows=lambda: 3,
    waiting_sentences=lambda: 5,
    cache=lambda: (70, 30),
    ticks=lambda: 11,
    admitted=lambda: {
        "unary": Taken(Cost(10, 1000), Cost(100, 10_000)), "stream": Taken(Cost(20, 2000), Cost(200, 20_000))
    },
    log_lines_dropped=lambda: 1,
    alerts_dropped=lambda: 2,
    no_log_calls=lambda: {"team-a": 6},
    spans_failed=lambda: 4,
)  # fmt: skip


def values(metrics: Metrics) -> dict[str, float]:
    """Samples by name and labels, as they stand in the text."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def a_call(method: str, code: grpc.StatusCode | None = grpc.StatusCode.OK, **fields: Any) -> CallRecord:
    call = CallRecord(method, "ipv4:127.0.0.1:4711", code=code)
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def test_a_call_is_counted_with_what_it_did() -> None:
    metrics = Metrics(VIEW)
    call = a_call("Embed", None)
    metrics.begin(call)
    assert values(metrics)["bilm_requests_in_flight{method=Embed}"] == 1
    call.code, call.duration_s = grpc.StatusCode.OK, 0.2
    call.computed(tokens=7, queue_s=0.004, inference_s=0.03)
    call.sentence_failed()
    metrics.end(call)
    found = values(metrics)
    assert found["bilm_requests_in_flight{method=Embed}"] == 0
    assert found["bilm_requests_total{code=OK,method=Embed}"] == 1
    assert found["bilm_request_duration_seconds_sum{method=Embed}"] == pytest.approx(0.2)
    assert found["bilm_queue_seconds_bucket{le=0.005,method=Embed}"] == 1
    assert found["bilm_queue_seconds_bucket{le=0.0025,method=Embed}"] == 0
    assert found["bilm_inference_seconds_sum{method=Embed}"] == pytest.approx(0.03)
    assert found["bilm_sentences_total{result=ok}"] == found["bilm_sentences_total{result=failed}"] == 1
    assert found["bilm_tokens_total"] == 7


def test_a_refusal_is_counted_by_its_reason_and_says_nothing_of_queue_and_engine() -> None:
    metrics = Metrics(VIEW)
    call = a_call("Embed", grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED", is_test=True)
    metrics.begin(call)
    metrics.end(call)
    found = values(metrics)
    assert found["bilm_requests_total{code=RESOURCE_EXHAUSTED,method=Embed}"] == 1  # tests are load, too
    assert found["bilm_refusals_total{method=Embed,reason=OVERLOADED}"] == 1
    assert found["bilm_queue_seconds_count{method=Embed}"] == 0


def test_a_call_without_a_code_is_counted() -> None:
    metrics = Metrics(VIEW)
    metrics.begin(call := a_call("GetModel", None))
    metrics.end(call)
    assert values(metrics)["bilm_requests_total{code=UNKNOWN,method=GetModel}"] == 1


def test_rounds_have_their_rows() -> None:
    metrics = Metrics(VIEW)
    for rows in (1, 2, 100):
        metrics.round(rows)
    metrics.round(50, failed=True)
    found = values(metrics)
    assert found["bilm_rounds_total{result=ok}"] == found["bilm_round_rows_count"] == 3
    assert found["bilm_rounds_total{result=failed}"] == 1
    assert found["bilm_round_rows_sum"] == 103
    assert found["bilm_round_rows_bucket{le=64.0}"] == 2


def test_what_can_be_alerted_on_is_there_from_the_start() -> None:
    found = values(Metrics(VIEW))
    for method in METHODS:
        for code in ("OK", "INTERNAL"):
            assert found[f"bilm_requests_total{{code={code},method={method}}}"] == 0


def test_the_view_is_read_at_each_scrape() -> None:
    rows = iter((3, 4))
    metrics = Metrics(replace(VIEW, rows=lambda: next(rows), serving=lambda: False))
    assert values(metrics)["bilm_slots_in_use"] == 3
    found = values(metrics)
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
    found = values(Metrics(VIEW))
    if "process_open_fds" not in found:
        pytest.skip("needs /proc")
    assert 0 < found["process_open_fds"] < found["process_max_fds"]
    assert 0 < found["process_resident_memory_bytes"] < found["bilm_memory_limit_bytes"]


def test_registries_are_apart() -> None:
    first, second = Metrics(VIEW), Metrics(VIEW)
    first.round(1)
    assert values(second)["bilm_rounds_total{result=ok}"] == 0


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
    metrics = Metrics(replace(VIEW, gpu=Gpu(nvml, "handle")))
    found = values(metrics)
    assert found["bilm_gpu_memory_used_bytes"] == 10
    assert found["bilm_gpu_memory_bytes"] == 100
    assert found["bilm_gpu_busy_ratio"] == 0.35
    nvml.failing = True
    for _ in range(3):
        assert "bilm_gpu_busy_ratio" not in values(metrics)
    assert [record.getMessage() for record in caplog.records] == ["NVML has no figures of the GPU: GPU is lost"]
    nvml.failing = False
    assert "bilm_gpu_busy_ratio" in values(metrics)


def test_without_a_driver_there_is_no_gpu(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    assert find_gpu("00000000-0000-0000-0000-000000000000") is None
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert find_gpu("00000000-0000-0000-0000-000000000000") is None
    assert all(record.getMessage().startswith("no metrics of the GPU: ") for record in caplog.records)
    assert len(caplog.records) == 2


# ---- over HTTP ----


@contextmanager
def exporting(exchange_timeout_s: float = 5.0) -> Iterator[MetricsExporter]:
    exporter = MetricsExporter(Metrics(VIEW).registry, "127.0.0.1:0", exchange_timeout_s)
    exporter.start()
    try:
        yield exporter
    finally:
        exporter.stop()


@pytest.fixture
def exporter() -> Iterator[MetricsExporter]:
    with exporting() as exporter:
        yield exporter


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def get(exporter: MetricsExporter, path: str = "/metrics", **kwargs: Any) -> Any:
    request = urllib.request.Request(f"http://{exporter.address}{path}", **kwargs)
    return urllib.request.urlopen(request, timeout=60)


def connect(exporter: MetricsExporter) -> socket.socket:
    host, port = split_address(exporter.address)
    return socket.create_connection((host, port), 60)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what a thread does without telling."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def test_the_metrics_are_there_over_http(exporter: MetricsExporter) -> None:
    with get(exporter) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"\nbilm_slots 128.0\n" in response.read()
    with get(exporter, headers={"Accept": "application/openmetrics-text; version=1.0.0"}) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        assert response.read().endswith(b"# EOF\n")
    with get(exporter, "/metrics?name=x") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/", "GET", 404), ("/metricsx", "GET", 404), ("/metrics", "POST", 405)]
)
def test_there_is_nothing_else(exporter: MetricsExporter, path: str, method: str, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        get(exporter, path, method=method)
    assert error.value.code == status
    error.value.close()


def test_idle_and_slow_callers_are_few_and_cut_off() -> None:
    with exporting(exchange_timeout_s=3.0) as exporter:
        n_threads, n_descriptors = threading.active_count(), descriptors()
        idle = [connect(exporter) for _ in range(15)]
        with get(exporter) as response:
            assert response.status == 200
        idle.append(connect(exporter))
        wait_until(lambda: exporter._n_connections == 16)
        with connect(exporter) as one_too_many:
            assert one_too_many.recv(1) == b""
        assert exporter._n_connections == 16  # so it wasn't its time that was over
        for number, connection in enumerate(idle):
            if number % 2:
                connection.sendall(b"GET /met")
        assert threading.active_count() == n_threads
        for connection in idle:
            with connection, suppress(ConnectionResetError):
                assert connection.recv(1) == b""  # when its time is over, whether it has sent something or not
        with get(exporter) as response:
            assert response.status == 200
        wait_until(lambda: descriptors() == n_descriptors)


def test_a_caller_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with exporting(exchange_timeout_s=0.5) as exporter:
        monkeypatch.setattr(exporter, "_response", lambda head: b"x" * 64 * 2**20)
        with connect(exporter) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            wait_until(lambda: exporter._n_connections == 1)
            wait_until(lambda: exporter._n_connections == 0)


def test_a_large_answer_arrives_whole(exporter: MetricsExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    from bilm_server import metrics_http

    monkeypatch.setattr(exporter, "_response", lambda head: metrics_http._http("200 OK", b"x" * 8 * 2**20))
    with get(exporter) as response:
        assert len(response.read()) == 8 * 2**20


@pytest.mark.parametrize("head", [b"x" * 100_000, b"GET /metrics HTTP/1.1\r\nA: " + b"x" * 100_000 + b"\r\n\r\n"])
def test_long_heads_are_not_read(exporter: MetricsExporter, head: bytes) -> None:
    with connect(exporter) as connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(head)
        assert connection.recv(1) == b""
    with get(exporter) as response:
        assert response.status == 200


@pytest.mark.parametrize("head", [b"\r\n\r\n", b"\xff\x00\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics\r\n\r\n"])
def test_odd_heads_are_answered(exporter: MetricsExporter, head: bytes) -> None:
    with connect(exporter) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 ")


def test_a_failure_is_an_answer_and_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    exporter = MetricsExporter(Metrics(replace(VIEW, rows=lambda: 1 // 0)).registry, "127.0.0.1:0")
    exporter.start()
    with pytest.raises(urllib.error.HTTPError) as error:
        get(exporter)
    assert error.value.code == 500
    error.value.close()
    exporter.stop()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("bilm_server.metrics", "ERROR")


def test_stopping_closes_everything_and_may_be_repeated() -> None:
    n_descriptors = descriptors()
    exporter = MetricsExporter(Metrics(VIEW).registry, "127.0.0.1:0", exchange_timeout_s=3600)
    exporter.stop()
    exporter.start()
    with connect(exporter) as connection:
        wait_until(lambda: exporter._n_connections == 1)
        exporter.stop()
        exporter.stop()
        assert connection.recv(1) == b""  # closed without waiting for the connection's time to pass
    with pytest.raises(ConnectionRefusedError):
        connect(exporter)
    assert descriptors() == n_descriptors


def test_an_address_that_is_taken_is_an_error(exporter: MetricsExporter) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsExporter(Metrics(VIEW).registry, exporter.address).start()


def test_a_thread_that_cannot_serve_is_an_error_and_not_waited_for() -> None:
    def failing() -> asyncio.AbstractEventLoop:
        raise OSError("no descriptors left")

    def hanging() -> asyncio.AbstractEventLoop:
        release.wait(20)
        return asyncio.new_event_loop()

    registry = Metrics(VIEW).registry
    for new_loop, error, timeout_s in ((failing, "no descriptors left", 20), (hanging, "did not begin within", 0.01)):
        release = threading.Event()
        exporter = MetricsExporter(registry, "127.0.0.1:0", start_timeout_s=timeout_s, new_loop=new_loop)
        with pytest.raises(OSError, match=error):
            exporter.start()
        release.set()
        exporter.stop()
    wait_until(lambda: all(thread.name != "metrics" for thread in threading.enumerate()))


def test_a_caller_that_sends_a_byte_at_a_time_is_cut_off() -> None:
    with exporting(exchange_timeout_s=0.1) as exporter, connect(exporter) as connection:
        with suppress(ConnectionResetError, BrokenPipeError):
            while not select.select([connection], [], [], 0.005)[0]:
                connection.sendall(b"x")
            assert connection.recv(1) == b""
        with get(exporter) as response:
            assert response.status == 200


async def test_a_scrape_does_not_hold_the_event_loop() -> None:
    """The service's loop goes on while the scrape is at its slowest."""
    held, release = threading.Event(), threading.Event()

    def rows() -> int:
        held.set()
        assert release.wait(60)
        return 1

    exporter = MetricsExporter(Metrics(replace(VIEW, rows=rows)).registry, "127.0.0.1:0")
    exporter.start()
    scrape = asyncio.create_task(asyncio.to_thread(lambda: get(exporter).read()))
    assert await asyncio.to_thread(held.wait, 60)
    release.set()
    assert b"bilm_slots_in_use 1.0" in await scrape
    exporter.stop()
