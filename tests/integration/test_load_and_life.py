"""Overload, giving up, health, shutdown: what happens around a request."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_server.config_sources import load_config
from bilm_server.errors import EngineLostError
from bilm_server.inference.types import Sentence
from bilm_server.protocols.grpc.health import LIVENESS
from bilm_server.protocols.ops.readiness_port import GREETING
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.integration_support import PLAIN, health_stub, tokens
from tests.integration.test_embed import refusal
from tests.support.faulty_server import BROKEN, HANG
from tests.support.hooked_engine import HookedEngine, Hooks
from tests.support.processes import wait_until
from tests.support.server_processes import ProcessServer
from tests.support.servers import LoopServer, new_server, started

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "bilm_api.v1.EmbedService")


class Gate:
    """Hold an engine until it is opened; keep which sentences joined since the last time that it went on."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []
        self._joined: list[str] = []

    def hold(self, engine: HookedEngine[Sentence]) -> None:
        engine.hooks = Hooks(join=self._note, advance=self._wait)

    def _note(self, sentences: Sequence[Sentence]) -> None:
        self._joined += [sentence.tokens[0] for sentence in sentences]

    def _wait(self) -> None:
        if self._joined:
            self.batches.append(self._joined.copy())
            self._joined.clear()
        self.entered.set()
        assert self.open.wait(60)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def fail() -> None:
    """What a hook of an engine does that fails."""
    raise ZeroDivisionError("division by zero")


def one(*words: str, **fields: Any) -> embed_pb2.EmbedRequest:
    return embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*words)], **fields)


def test_callers_are_batched_together_and_an_idle_server_does_not_wait(
    gate: Gate, start: Callable[..., LoopServer]
) -> None:
    server = start()
    gate.hold(server.engine)
    stub = server.stub()
    calls = [stub.Embed.future(one("first"))]
    assert gate.entered.wait(60)  # at once, alone
    calls += [stub.Embed.future(one(f"w{i}")) for i in range(10)]
    wait_until(lambda: server.admission.used.tokens == 11, "all calls are admitted")
    gate.open.set()
    for call in calls:
        call.result(60)
    assert gate.batches[0] == ["first"]
    assert sorted(gate.batches[1]) == sorted(f"w{i}" for i in range(10))


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_work_that_nobody_waits_for_is_not_done(gate: Gate, start: Callable[..., LoopServer], how: str) -> None:
    server = start()
    gate.hold(server.engine)
    stub = server.stub()
    used = server.admission
    first = stub.Embed.future(one("first"))
    assert gate.entered.wait(60)
    doomed = stub.Embed.future(one("doomed"), timeout=0.2 if how == "deadline" else None)
    wait_until(lambda: used.used.tokens == 2 or how == "deadline", "the call is admitted")
    if how == "cancel":
        doomed.cancel()
    else:
        assert doomed.exception(60).code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[union-attr]
    wait_until(lambda: used.used.tokens == 1, "its room is given back")
    gate.open.set()
    first.result(60)
    stub.Embed(one("last"))
    assert gate.batches == [["first"], ["last"]]


def test_a_sentence_in_flight_is_left_when_its_caller_has_gone(gate: Gate, start: Callable[..., LoopServer]) -> None:
    server = start()
    gate.hold(server.engine)
    stub = server.stub()
    doomed = stub.Embed.future(one("doomed"))
    assert gate.entered.wait(60)
    doomed.cancel()
    wait_until(lambda: server.admission.used.tokens == 0, "its room is given back")
    gate.open.set()
    assert stub.Embed(one("next")).results[0].HasField("embedding")
    assert server.model.engine.in_flight == 0


def test_overload_is_refused_at_once_with_a_time_to_come_back(gate: Gate, start: Callable[..., LoopServer]) -> None:
    server = start("--max-waiting-tokens", "100", "--max-tokens-per-request", "100")
    gate.hold(server.engine)
    stub = server.stub()
    waiting = stub.Embed.future(embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*["w"] * 95)]))
    assert gate.entered.wait(60)
    with pytest.raises(grpc.RpcError) as error:
        stub.Embed(embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*["w"] * 6)]))
    code, why, metadata = refusal(error.value)
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert 20 <= int(metadata["grpc-retry-pushback-ms"]) <= 10_000
    gate.open.set()
    waiting.result(60)
    stub.Embed(embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*["w"] * 6)]))


def test_health_answers_while_the_model_is_busy(gate: Gate, start: Callable[..., LoopServer]) -> None:
    server = start()
    gate.hold(server.engine)
    call = server.stub().Embed.future(one("busy"))
    assert gate.entered.wait(60)
    health = health_stub(server.channel())
    for service in SERVICES:
        assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status == SERVING
    with pytest.raises(grpc.RpcError) as error:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    gate.open.set()
    call.result(60)


def test_a_failure_is_internal_and_says_nothing_of_the_inside(server: LoopServer) -> None:
    with server.engine.hooked(advance=fail):
        (result,) = server.stub().Embed(one("w")).results
    assert result.error.code == code_pb2.INTERNAL
    assert "division" not in result.error.message
    assert server.stub().Embed(one("w")).results[0].HasField("embedding")


def test_a_poisoned_sentence_is_its_callers_alone(server: LoopServer) -> None:
    """Sentences of three calls and a stream are in flight together, and one of them makes every round fail."""
    words = [["a"] * 40, ["b", "b"], ["poison"] * 30, ["c"]]
    known = [server.stub().Embed(one(*sentence)) for sentence in words]

    def check() -> None:
        if any(sentence.tokens[0] == "poison" for sentence in server.engine.present):
            raise MemoryError("out of memory, simulated")

    with server.engine.hooked(advance=check), ThreadPoolExecutor(4) as pool:
        stub = server.stub()
        together = embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*sentence) for sentence in words[1:]])
        calls = [pool.submit(stub.Embed, one(*sentence)) for sentence in words]
        mixed = pool.submit(stub.Embed, together).result(60)
        start = embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=PLAIN))
        items = [
            embed_pb2.EmbedStreamRequest(item=embed_pb2.StreamItem(id=number, sentence=tokens(*sentence)))
            for number, sentence in enumerate(words)
        ]
        streamed = {message.id: message for message in stub.EmbedStream(iter([start, *items]))}
        results = [call.result(60).results[0] for call in calls]
    assert [result.WhichOneof("outcome") for result in mixed.results] == ["embedding", "error", "embedding"]
    assert [result.WhichOneof("outcome") for result in results] == ["embedding", "embedding", "error", "embedding"]
    assert results[2].error.code == streamed[2].error.code == code_pb2.INTERNAL
    for index in (0, 1, 3):
        data = known[index].results[0].embedding.tensor.data
        assert results[index].embedding.tensor.data == streamed[index].rows.embedding.tensor.data == data


def test_health_follows_the_model(start: Callable[..., LoopServer]) -> None:
    server = start()
    updates = health_stub(server.channel()).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(updates).status == SERVING
    with server.engine.hooked(advance=fail, warm_up=fail):
        with pytest.raises(grpc.RpcError) as error:
            server.stub().Embed(one("w"))
        assert refusal(error.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "MODEL_FAILING")
        with pytest.raises(grpc.RpcError) as error:  # a stream as a whole, so that its caller resumes it elsewhere
            list(server.stub().EmbedStream(iter(stream_of("w"))))
        assert refusal(error.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "MODEL_FAILING")
        assert next(updates).status == NOT_SERVING
        assert is_alive(server)
    assert next(updates).status == SERVING  # found out by itself: a balancer would send nothing
    updates.cancel()


def test_a_fixed_ready_port_is_open_while_the_server_is_ready(
    start: Callable[..., LoopServer],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    server = start("--ready-listen", "{}:{}".format(*address))
    wait_until(lambda: greets(address), "the port is open")
    with server.engine.hooked(advance=fail, warm_up=fail):
        with pytest.raises(grpc.RpcError):
            server.stub().Embed(one("w"))
        wait_until(lambda: not greets(address), "the port is closed")
    wait_until(lambda: greets(address), "the port is open")
    server.server.ask_to_stop()
    server.call(server.server.serve)  # raises what the watchdog has failed with
    server.call(server.server.drain)
    wait_until(lambda: not greets(address), "the port is closed")


def greets(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=5) as connection:
            return connection.recv(100) == GREETING
    except OSError:
        return False


def test_a_hung_engine_is_out_and_its_callers_are_let_go(start: Callable[..., LoopServer], gate: Gate) -> None:
    server = start("--hang-s", "0.5")
    gate.hold(server.engine)
    updates = health_stub(server.channel()).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(updates).status == SERVING
    with pytest.raises(grpc.RpcError) as error:
        server.stub().Embed(one("w"), timeout=60)
    assert refusal(error.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "MODEL_FAILING")
    assert next(updates).status == NOT_SERVING
    assert is_alive(server)
    gate.open.set()
    assert next(updates).status == SERVING
    assert server.stub().Embed(one("w")).results[0].HasField("embedding")
    updates.cancel()


def test_a_lost_engine_ends_the_service(start: Callable[..., LoopServer]) -> None:
    server = start("--give-up-s", "0.5")
    with server.engine.hooked(advance=fail, warm_up=fail):
        with pytest.raises(grpc.RpcError):
            server.stub().Embed(one("w"))
        with pytest.raises(EngineLostError, match="fails"):
            server.call(server.server.serve)


def test_not_serving_before_the_warm_up() -> None:
    seen: list[int] = []
    server = LoopServer()

    def look() -> None:
        with grpc.insecure_channel(server.target) as channel:
            seen.extend(
                health_stub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status
                for service in SERVICES
            )

    server.engine.hooks = Hooks(warm_up=look)
    server.start()
    server.stop()
    assert seen == [NOT_SERVING, NOT_SERVING]


def is_alive(server: LoopServer) -> bool:
    request = health_pb2.HealthCheckRequest(service=LIVENESS)
    return bool(health_stub(server.channel()).Check(request, timeout=60).status == SERVING)


def stream_of(*words: str) -> list[embed_pb2.EmbedStreamRequest]:
    start = embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=PLAIN))
    item = embed_pb2.StreamItem(id=1, sentence=tokens(*words))
    return [start, embed_pb2.EmbedStreamRequest(item=item)]


def test_reflection_is_there_only_when_asked_for(start: Callable[..., LoopServer]) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with_it = stub(start("--reflection").channel())
    (response,) = with_it.ServerReflectionInfo(iter([request]))
    names = {service.name for service in response.list_services_response.service}
    assert {"bilm_api.v1.EmbedService", "grpc.health.v1.Health"} <= names
    without = stub(start().channel())
    with pytest.raises(grpc.RpcError) as error:
        list(without.ServerReflectionInfo(iter([request])))
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


# ---- the process ----


def test_a_process_whose_engine_hangs_ends_with_3(tmp_path: Path) -> None:
    flags = ("--hang-s", "0.5", "--give-up-s", "0.5")
    environment = {BROKEN: str(tmp_path / "broken")}
    faulty = ProcessServer(*flags, module="tests.support.faulty_server", environment=environment)
    with faulty as server, grpc.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.RpcError) as error:
            embed_pb2_grpc.EmbedServiceStub(channel).Embed(one(HANG), timeout=60)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert server.wait(240) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(number: signal.Signals) -> None:
    with ProcessServer() as server, grpc.insecure_channel(server.target) as channel:
        stub = embed_pb2_grpc.EmbedServiceStub(channel)
        in_flight = stub.Embed.future(
            embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*["w"] * 8000), tokens("b")])
        )
        health = health_stub(channel)
        updates = health.Watch(health_pb2.HealthCheckRequest())
        assert next(updates).status == SERVING
        health.Check(health_pb2.HealthCheckRequest())  # by then the server, too, is done with the first update
        server.send_signal(number)
        assert next(updates).status == NOT_SERVING
        assert in_flight.result(60).results[1].HasField("embedding")
        updates.cancel()
        assert server.wait() == 0


def test_the_grace_time_bounds_the_drain() -> None:
    with ProcessServer("--grace-s", "0.2") as server, grpc.insecure_channel(server.target) as channel:
        stay_open = threading.Event()
        never_ending = embed_pb2_grpc.EmbedServiceStub(channel).EmbedStream(unfinished(stay_open))
        assert next(never_ending).rows.last
        server.send_signal(signal.SIGTERM)
        assert server.wait(25) == 0  # the default would be 30 s
        stay_open.set()


def unfinished(stay_open: threading.Event) -> Iterator[embed_pb2.EmbedStreamRequest]:
    yield from stream_of("w")
    stay_open.wait(60)


def test_a_drain_waits_neither_for_health_watchers_nor_for_reflection(start: Callable[..., LoopServer]) -> None:
    server = start("--reflection", "--grace-s", "3600")
    updates = health_stub(server.channel()).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(updates).status == SERVING
    stay_open = threading.Event()

    def questions() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        stay_open.wait(60)

    stub: Any = reflection_pb2_grpc.ServerReflectionStub
    answers = stub(server.channel()).ServerReflectionInfo(questions(), timeout=60)
    next(answers)
    assert is_alive(server)  # by then the server, too, is done with what both have received
    server.call(server.server.drain)
    for call in (updates, answers):
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert refusal(error.value)[1] == "SHUTTING_DOWN"
    stay_open.set()


def failed_start(*flags: str) -> tuple[int, str]:
    """Return the exit code of a server that can't start, and what it has written."""
    server = ProcessServer(*flags)
    server.launch()
    return server.wait(), server.text()


def test_a_taken_port_is_an_error(server: LoopServer) -> None:
    code, text = failed_start("--listen", server.target)
    assert code == 1
    assert f"can't listen on {server.target}" in text


def test_a_model_that_is_not_there_is_an_error() -> None:
    found = failed_start("--model", "/nowhere/model.safetensors")
    assert found == (1, "bilm-serve: /nowhere/model.safetensors: no such file or folder\n")


def test_a_device_that_is_not_there_is_an_error() -> None:
    code, text = failed_start("--device", "cuda:77")
    assert code == 1
    assert "cuda:77" in text


def test_log_lines_can_be_json_and_never_hold_text() -> None:
    import json

    with ProcessServer("--log-format", "json") as server:
        with grpc.insecure_channel(server.target) as channel:
            embed_pb2_grpc.EmbedServiceStub(channel).Embed(one("confidential"))
        wait_until(lambda: "Embed OK" in server.text(), "the call's line is written")
        for _ in range(2):
            server.send_signal(signal.SIGTERM)
        server.wait()
        lines = [json.loads(line) for line in server.lines]
    assert any(line["message"].startswith("Embed OK") for line in lines)
    assert "confidential" not in server.text()


async def test_stop_may_be_called_twice_and_before_start() -> None:
    from bilm_server.served_model import load_served_model

    config = load_config(["--model", "random:tiny", "--listen", "127.0.0.1:0"])
    never_started = new_server(config, load_served_model(config))
    await never_started.stop()
    server = new_server(config, load_served_model(config))
    await started(server)
    waiting = asyncio.create_task(server.serve())
    server.ask_to_stop()
    await waiting
    await server.stop()
    await server.stop()
