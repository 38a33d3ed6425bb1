"""The metrics over HTTP, with registries of the tests' own."""

import asyncio
import select
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from bilm_server.addresses import split_address
from bilm_server.errors import BindError
from bilm_server.protocols.ops.metrics_endpoint import MetricsExporter
from prometheus_client import CollectorRegistry, Gauge


def registry_with(read: Callable[[], float], text: str = "Read at each scrape.") -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("bilm_slots", text, registry=registry).set_function(read)
    return registry


REGISTRY = registry_with(lambda: 128)


@contextmanager
def exporting(exchange_timeout_s: float = 5.0, registry: CollectorRegistry = REGISTRY) -> Iterator[MetricsExporter]:
    exporter = MetricsExporter(registry, "127.0.0.1:0", exchange_timeout_s)
    exporter.open()
    try:
        yield exporter
    finally:
        exporter.close()


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


def test_one_connection_too_many_is_closed_at_once() -> None:
    with exporting(exchange_timeout_s=3600) as exporter:
        n_threads = threading.active_count()
        idle = [connect(exporter) for _ in range(15)]
        with get(exporter) as response:
            assert response.status == 200
        idle.append(connect(exporter))
        wait_until(lambda: exporter.n_connections == 16)
        with connect(exporter) as one_too_many:
            assert one_too_many.recv(1) == b""
        assert threading.active_count() == n_threads
        for connection in idle:
            connection.close()


def test_idle_and_slow_clients_are_cut_off() -> None:
    with exporting(exchange_timeout_s=0.3) as exporter:
        n_descriptors = descriptors()
        idle = [connect(exporter) for _ in range(16)]
        for number, connection in enumerate(idle):
            if number % 2:
                connection.sendall(b"GET /met")
        for connection in idle:
            with connection, suppress(ConnectionResetError):
                assert connection.recv(1) == b""  # when its time is over, whether it has sent something or not
        with get(exporter) as response:
            assert response.status == 200
        wait_until(lambda: descriptors() == n_descriptors)


def test_a_client_that_does_not_read_is_cut_off() -> None:
    large = registry_with(lambda: 1, "x" * 32 * 2**20)  # more than the kernel takes without a reader
    with exporting(exchange_timeout_s=0.5, registry=large) as exporter, connect(exporter) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        wait_until(lambda: exporter.n_connections == 1)
        wait_until(lambda: exporter.n_connections == 0)


def test_a_large_response_arrives_whole() -> None:
    text = "x" * 8 * 2**20
    with exporting(registry=registry_with(lambda: 1, text)) as exporter, get(exporter) as response:
        assert text.encode() in response.read()


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
    exporter = MetricsExporter(registry_with(lambda: 1 // 0), "127.0.0.1:0")
    exporter.open()
    with pytest.raises(urllib.error.HTTPError) as error:
        get(exporter)
    assert error.value.code == 500
    error.value.close()
    exporter.close()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("bilm_server.protocols.ops.metrics_endpoint", "ERROR")


def test_stopping_closes_everything_and_may_be_repeated() -> None:
    n_descriptors = descriptors()
    exporter = MetricsExporter(REGISTRY, "127.0.0.1:0", exchange_timeout_s=3600)
    exporter.close()
    exporter.open()
    with connect(exporter) as connection:
        wait_until(lambda: exporter.n_connections == 1)
        exporter.close()
        exporter.close()
        assert connection.recv(1) == b""  # closed without waiting for the connection's time to pass
    with pytest.raises(ConnectionRefusedError):
        connect(exporter)
    assert descriptors() == n_descriptors


def test_an_address_that_is_taken_is_an_error(exporter: MetricsExporter) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsExporter(REGISTRY, exporter.address).open()


def test_a_thread_that_cannot_serve_is_an_error_and_not_waited_for() -> None:
    def failing() -> asyncio.AbstractEventLoop:
        raise OSError("no descriptors left")

    def hanging() -> asyncio.AbstractEventLoop:
        release.wait(20)
        return asyncio.new_event_loop()

    for new_loop, error, timeout_s in ((failing, "no descriptors left", 20), (hanging, "did not begin within", 0.01)):
        release = threading.Event()
        exporter = MetricsExporter(REGISTRY, "127.0.0.1:0", start_timeout_s=timeout_s, new_loop=new_loop)
        with pytest.raises(OSError, match=error):
            exporter.open()
        release.set()
        exporter.close()
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

    exporter = MetricsExporter(registry_with(rows), "127.0.0.1:0")
    exporter.open()
    scrape = asyncio.create_task(asyncio.to_thread(lambda: get(exporter).read()))
    assert await asyncio.to_thread(held.wait, 60)
    release.set()
    assert b"bilm_slots 1.0" in await scrape
    exporter.close()


async def test_it_says_where_it_listens_and_what_it_cannot_listen_on() -> None:
    exporter = MetricsExporter(REGISTRY, "127.0.0.1:0")
    assert await exporter.start() == f"metrics on http://{exporter.address}/metrics"
    with pytest.raises(BindError, match=f"metrics_listen: can't listen on {exporter.address}"):
        await MetricsExporter(REGISTRY, exporter.address).start()
    await exporter.stop()
