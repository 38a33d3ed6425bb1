import logging
import os
import resource
from typing import Any

import grpc
import pytest
from bilm_server.config_sources import load_config
from bilm_server.errors import ConfigurationError
from bilm_server.protocols.grpc.connections import (
    HEALTH_CONNECTIONS,
    MOST_BY_DEFAULT,
    OWN_RESERVE,
    Descriptors,
    bounded,
    connection_limit,
    connection_options,
    descriptor_limit,
    health_server,
    open_descriptors,
)
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.grpc.interceptors import OpenInterceptor
from bilm_server.served_model import load_served_model
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.servers import new_server

RESERVE = OWN_RESERVE + HEALTH_CONNECTIONS
IN_USE = 22


def test_it_counts_what_is_open() -> None:
    before = open_descriptors()
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(7)]
    assert open_descriptors() == before + 7
    for file in files:
        os.close(file)
    assert open_descriptors() == before


def test_it_reads_the_soft_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert descriptor_limit() == soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        assert descriptor_limit() == soft - 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("soft", [resource.RLIM_INFINITY, 2**40])
def test_no_limit_is_a_number_that_grpc_takes(soft: int) -> None:
    assert bounded(soft) == 2**31 - 1
    assert connection_limit(0, Descriptors(bounded(soft), IN_USE)) == MOST_BY_DEFAULT


@pytest.mark.parametrize(
    ("limit", "wanted", "expected"),
    [
        (256, 0, 256 - IN_USE - RESERVE),
        (256, 1, 1),
        (256, 256 - IN_USE - RESERVE, 256 - IN_USE - RESERVE),
        (1024, 0, 1024 - IN_USE - RESERVE),
        (MOST_BY_DEFAULT + IN_USE + RESERVE - 1, 0, MOST_BY_DEFAULT - 1),
        (2**20, 0, MOST_BY_DEFAULT),
        (2**20, 100_000, 100_000),
        (IN_USE + RESERVE + 1, 0, 1),
    ],
)
def test_connections_fit_below_the_limit(limit: int, wanted: int, expected: int) -> None:
    assert connection_limit(wanted, Descriptors(limit, IN_USE)) == expected


@pytest.mark.parametrize(
    ("limit", "wanted", "message"),
    [
        (256, 107, "107 connections don't fit: ulimit -n is 256, with 22 descriptors in use and 128 kept in reserve; "),
        (1024, 5000, "set it to 6144 or more"),
        (IN_USE + RESERVE, 0, "no connection fits: ulimit -n is 150, .*; set it to 1024 or more"),
        (20, 0, "no connection fits"),
        (20, 1, "1 connections don't fit"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_would(limit: int, wanted: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^max_connections: .*{message}"):
        connection_limit(wanted, Descriptors(limit, IN_USE))


@pytest.mark.parametrize(
    ("limit", "wanted", "warns"),
    [(256, 0, True), (256, 50, False), (1024, 0, False), (IN_USE + RESERVE + 511, 0, True)],
)
def test_a_low_limit_is_warned_of(limit: int, wanted: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fitting = connection_limit(wanted, Descriptors(limit, IN_USE))
    expected = (
        f"only {fitting} connections fit: ulimit -n is {limit}, with 22 descriptors in use and 128 kept in reserve; "
    )
    assert [record.message.startswith(expected) for record in caplog.records] == [True] * warns
    assert all("set it to 1024 or more (LimitNOFILE=" in record.message for record in caplog.records)


@pytest.mark.parametrize(("max_age_s", "expected_ms"), [(300.0, 300_000), (0.5, 500), (1e9, 2**31 - 1)])
def test_options_of_connections(max_age_s: float, expected_ms: int) -> None:
    options = dict(connection_options(77, max_age_s))
    assert options["grpc.max_allowed_incoming_connections"] == 77
    assert options["grpc.max_connection_age_ms"] == expected_ms
    assert options["grpc.keepalive_timeout_ms"] == options["grpc.http2.ping_timeout_ms"]
    assert options["grpc.http2.min_ping_interval_without_data_ms"] < 60_000  # what clients do, strictly
    assert "grpc.max_connection_idle_ms" not in options
    assert len(options) == len(connection_options(77, max_age_s))


async def test_health_alone() -> None:
    reporter = HealthReporter("some.v1.Service")
    reporter.set({"a": True})
    server = health_server(OpenInterceptor({"grpc.health.v1.Health"}))
    reporter.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop(0)


async def test_a_server_does_not_start_with_more_than_fit() -> None:
    more = str(Descriptors.now().limit)
    config = load_config(["--model", "random:tiny", "--listen", "127.0.0.1:0", "--max-connections", more])
    server = new_server(config, load_served_model(config))
    with pytest.raises(ConfigurationError, match=f"{more} connections don't fit"):
        await server.start()
    await server.stop()
