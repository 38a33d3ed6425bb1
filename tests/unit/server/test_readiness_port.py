"""A port whose being open says something."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator

import pytest
from bilm_server.errors import BindError
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.ops.readiness_port import GREETING, ReadinessPort


@pytest.fixture
def health() -> HealthReporter:
    return HealthReporter("some.v1.Service")


@pytest.fixture
async def ready(health: HealthReporter) -> AsyncIterator[ReadinessPort]:
    port = ReadinessPort("127.0.0.1:0", health, retry_s=0.001)
    await port.start()
    yield port
    await port.stop()


async def said_on(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = await reader.read()
    writer.close()
    await writer.wait_closed()
    return said


async def is_open(port: int) -> bool:
    try:
        return await said_on(port) == GREETING
    except OSError:
        return False


async def until_open(port: int, wanted: bool) -> None:
    async with asyncio.timeout(20):
        while await is_open(port) is not wanted:  # each look goes over the network, and lets others run
            pass


async def test_open_only_while_ready_and_always_on_the_same_port(ready: ReadinessPort, health: HealthReporter) -> None:
    port = ready.port
    assert not await is_open(port)
    for _ in range(3):
        health.set({"a": True})
        await until_open(port, True)
        health.set({"a": False})
        await until_open(port, False)
        assert ready.port == port


async def test_it_follows_the_last_of_reports_that_come_at_once(ready: ReadinessPort, health: HealthReporter) -> None:
    for works in (True, False, True, True, False, True):
        health.set({"a": works})
    await until_open(ready.port, True)
    for works in (False, True, False):
        health.set({"a": works})
    await until_open(ready.port, False)


async def test_draining_closes_it_for_good(ready: ReadinessPort, health: HealthReporter) -> None:
    health.set({"a": True})
    await until_open(ready.port, True)
    health.drain()
    await until_open(ready.port, False)
    health.set({"a": False})
    health.set({"a": True})
    await asyncio.sleep(0)
    assert not await is_open(ready.port)


async def test_a_port_that_cannot_be_opened_again_changes_no_health_and_is_tried_again(
    ready: ReadinessPort, health: HealthReporter, caplog: pytest.LogCaptureFixture
) -> None:
    health.set({"a": True})
    await until_open(ready.port, True)
    health.set({"a": False})
    await until_open(ready.port, False)
    failed = asyncio.Event()

    def seen(record: logging.LogRecord) -> bool:
        failed.set()
        return True

    caplog.handler.addFilter(seen)
    with socket.create_server(("127.0.0.1", ready.port)):
        health.set({"a": True})
        assert health.serving
        await asyncio.wait_for(failed.wait(), 20)
    await until_open(ready.port, True)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert f"can't listen on 127.0.0.1:{ready.port}" in errors[0]


async def test_it_stops_while_it_tries_to_open(health: HealthReporter) -> None:
    ready = ReadinessPort("127.0.0.1:0", health)
    await ready.start()
    health.set({"a": True})
    await ready.stop()
    await ready.stop()
    assert not await is_open(ready.port)


async def test_those_who_only_connect_cost_nothing_that_lasts(ready: ReadinessPort, health: HealthReporter) -> None:
    health.set({"a": True})
    await until_open(ready.port, True)
    silent = [socket.create_connection(("127.0.0.1", ready.port)) for _ in range(50)]
    assert await said_on(ready.port) == GREETING
    for connection in silent:  # the server has ended each of them, although nobody read
        assert connection.recv(100) == GREETING
        assert connection.recv(100) == b""
        connection.close()


async def test_a_taken_port_is_an_error_at_the_start(health: HealthReporter) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(BindError, match="ready_listen: can't listen on 127.0.0.1:"),
    ):
        await ReadinessPort(f"127.0.0.1:{taken.getsockname()[1]}", health).start()
