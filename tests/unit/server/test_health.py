import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from bilm_server.protocols.grpc.health import INFERENCE, LIVENESS, HealthReporter
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "some.v1.Service"


class Served:
    def __init__(self, reporter: HealthReporter, channel: grpc.aio.Channel) -> None:
        self.reporter = reporter
        self.stub: Any = health_pb2_grpc.HealthStub(channel)

    async def ask(self, service: str) -> int:
        response = await self.stub.Check(health_pb2.HealthCheckRequest(service=service))
        return int(response.status)

    async def ready(self) -> set[int]:
        return {await self.ask(""), await self.ask(SERVICE)}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    server, reporter = grpc.aio.server(), HealthReporter(SERVICE)
    reporter.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(reporter, channel)
    await server.stop(None)


async def test_alive_from_the_start_ready_when_told(served: Served) -> None:
    assert (await served.ask(LIVENESS), await served.ready()) == (SERVING, {NOT_SERVING})
    served.reporter.set({"a": True})
    assert (await served.ask(LIVENESS), await served.ready()) == (SERVING, {SERVING})
    assert await served.ask(INFERENCE) == SERVING
    assert served.reporter.serving
    served.reporter.set({"a": False})
    assert (await served.ask(LIVENESS), await served.ready()) == (SERVING, {NOT_SERVING})


async def test_each_model_has_its_own_health_and_the_first_is_the_servers(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bilm_server.protocols.grpc.health")
    served.reporter.set({"a": True, "b": True})
    served.reporter.set({"a": True, "b": False})
    assert (await served.ask("model:a"), await served.ask("model:b")) == (SERVING, NOT_SERVING)
    assert await served.ready() == {SERVING}
    served.reporter.set({"a": False, "b": True})
    assert await served.ready() == {NOT_SERVING}
    assert (await served.ask("model:b"), await served.ask(INFERENCE)) == (SERVING, SERVING)
    served.reporter.set({"b": True})
    assert await served.ready() == {SERVING}
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.ask("model:a")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    served.reporter.drain()
    assert (await served.ask("model:b"), await served.ask(INFERENCE)) == (NOT_SERVING, SERVING)
    assert [record.getMessage() for record in caplog.records] == [
        "health: SERVING", "health of b: SERVING", "health of b: NOT_SERVING", "health: NOT_SERVING",
        "health of b: SERVING",
    ]  # fmt: skip


async def test_draining_is_for_good_and_alive(served: Served) -> None:
    served.reporter.set({"a": True})
    served.reporter.drain()
    for works in (True, False, True):
        served.reporter.set({"a": works})
        assert (await served.ask(LIVENESS), await served.ready()) == (SERVING, {NOT_SERVING})
        assert await served.ask(INFERENCE) == (SERVING if works else NOT_SERVING)
        assert not served.reporter.serving


async def test_only_changes_are_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bilm_server.protocols.grpc.health")
    for serving in (False, True, True, False, False):
        served.reporter.set({"a": serving})
    assert [record.getMessage() for record in caplog.records] == ["health: SERVING", "health: NOT_SERVING"]


async def test_watchers_see_every_lasting_change_and_unknown_names(served: Served) -> None:
    stub: Any = served.stub
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=20)
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert (await watch.read()).status == NOT_SERVING
    for works in (True, False, True):
        served.reporter.set({"a": works})
        assert (await watch.read()).status == (SERVING if works else NOT_SERVING)
    served.reporter.drain()
    assert (await watch.read()).status == NOT_SERVING
    unknown.cancel()
    watch.cancel()


@pytest.mark.skipif(not hasattr(health_pb2, "HealthListResponse"), reason="this grpcio-health-checking has no List")
async def test_list_has_every_name_and_nothing_else(served: Served) -> None:
    served.reporter.set({"a": True})
    messages: Any = health_pb2  # its stubs lack this one
    response = await served.stub.List(messages.HealthListRequest())
    assert {name: found.status for name, found in response.statuses.items()} == dict.fromkeys(
        ("", SERVICE, INFERENCE, LIVENESS, "model:a"), SERVING
    )
