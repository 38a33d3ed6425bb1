"""Overload, giving up, health, shutdown: what happens around a request."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.types import EngineResult
from bilm_server.config_sources import load_config
from bilm_server.errors import EngineLostError
from bilm_server.inference.types import Sentence
from bilm_server.protocols.grpc.health import LIVENESS
from bilm_server.protocols.ops.readiness_port import GREETING
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.integration_support import PLAIN, RunningServer, health_stub, tokens
from tests.integration.test_embed import refusal

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "bilm_api.v1.EmbedService")


class Gate:
    """Holds the model's thread until it is opened, and keeps who joined since the last time that it went on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []
        join, advance = RecurrentEngine.join, RecurrentEngine.advance
        joined: list[str] = []

        def join_and_tell(engine: RecurrentEngine[Sentence], sentences: Sequence[Sentence]) -> None:
            joined.extend(sentence.tokens[0] for sentence in sentences)
            join(engine, sentences)

        def advance_when_open(engine: RecurrentEngine[Sentence]) -> list[EngineResult[Sentence]]:
            if joined:
                self.batches.append(joined.copy())
                joined.clear()
            self.entered.set()
            assert self.open.wait(60)
            return advance(engine)

        monkeypatch.setattr(RecurrentEngine, "join", join_and_tell)
        monkeypatch.setattr(RecurrentEngine, "advance", advance_when_open)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def one(*words: str, **fields: Any) -> embed_pb2.EmbedRequest:
    return embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*words)], **fields)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what has no event of its own: the far end of a real connection."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def test_callers_are_batched_together_and_an_idle_server_does_not_wait(
    gate: Gate, start: Callable[..., RunningServer]
) -> None:
    server = start()
    stub = server.stub()
    calls = [stub.Embed.future(one("first"))]
    assert gate.entered.wait(60)  # at once, alone
    calls += [stub.Embed.future(one(f"w{i}")) for i in range(10)]
    wait_until(lambda: server.server.embedder.admission.used.tokens == 11)
    gate.open.set()
    for call in calls:
        call.result(60)
    assert gate.batches[0] == ["first"]
    assert sorted(gate.batches[1]) == sorted(f"w{i}" for i in range(10))


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_work_that_nobody_waits_for_is_not_done(gate: Gate, start: Callable[..., RunningServer], how: str) -> None:
    server = start()
    stub = server.stub()
    used = server.server.embedder.admission
    first = stub.Embed.future(one("first"))
    assert gate.entered.wait(60)
    doomed = stub.Embed.future(one("doomed"), timeout=0.2 if how == "deadline" else None)
    wait_until(lambda: used.used.tokens == 2 or how == "deadline")
    if how == "cancel":
        doomed.cancel()
    else:
        assert doomed.exception(60).code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[union-attr]
    wait_until(lambda: used.used.tokens == 1)
    gate.open.set()
    first.result(60)
    stub.Embed(one("last"))
    assert gate.batches == [["first"], ["last"]]


def test_a_sentence_in_flight_is_left_when_its_caller_has_gone(gate: Gate, start: Callable[..., RunningServer]) -> None:
    server = start()
    stub = server.stub()
    doomed = stub.Embed.future(one("doomed"))
    assert gate.entered.wait(60)
    doomed.cancel()
    wait_until(lambda: server.server.embedder.admission.used.tokens == 0)
    gate.open.set()
    assert stub.Embed(one("next")).results[0].HasField("embedding")
    assert server.server.embedder.model.engine.in_flight == 0


def test_overload_is_refused_at_once_with_a_time_to_come_back(gate: Gate, start: Callable[..., RunningServer]) -> None:
    server = start("--max-waiting-tokens", "100", "--max-tokens-per-request", "100")
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


def test_health_answers_while_the_model_is_busy(gate: Gate, start: Callable[..., RunningServer]) -> None:
    server = start()
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


def test_a_failure_is_internal_and_says_nothing_of_the_inside(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RecurrentEngine, "advance", lambda *_: 1 / 0)
        (result,) = server.stub().Embed(one("w")).results
    assert result.error.code == code_pb2.INTERNAL
    assert "division" not in result.error.message
    assert server.stub().Embed(one("w")).results[0].HasField("embedding")


def test_a_poisoned_sentence_is_its_callers_alone(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences of three calls and a stream are in flight together, and one of them makes every round fail."""
    advance, join, in_flight = RecurrentEngine.advance, RecurrentEngine.join, set[Sentence]()
    words = [["a"] * 40, ["b", "b"], ["poison"] * 30, ["c"]]
    known = [server.stub().Embed(one(*sentence)) for sentence in words]

    def noted(engine: RecurrentEngine[Sentence], sentences: Sequence[Sentence]) -> None:
        in_flight.update(sentences)
        join(engine, sentences)

    def poisoned(engine: RecurrentEngine[Sentence]) -> list[EngineResult[Sentence]]:
        if any(sentence.tokens[0] == "poison" for sentence in in_flight):
            in_flight.clear()
            raise MemoryError("out of memory, simulated")
        ended = advance(engine)
        in_flight.difference_update(result.sentence for result in ended)
        return ended

    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(RecurrentEngine, "join", noted)
        patch.setattr(RecurrentEngine, "advance", poisoned)
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


def test_health_follows_the_model(start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    updates = health_stub(server.channel()).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(updates).status == SERVING
    with monkeypatch.context() as patch:
        patch.setattr(RecurrentEngine, "advance", lambda *_: 1 / 0)
        patch.setattr(RecurrentEngine, "warm_up", lambda *_: 1 / 0)
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
    start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    server = start("--ready-listen", "{}:{}".format(*address))
    wait_until(lambda: greets(address))
    with monkeypatch.context() as patch:
        patch.setattr(RecurrentEngine, "advance", lambda *_: 1 / 0)
        patch.setattr(RecurrentEngine, "warm_up", lambda *_: 1 / 0)
        with pytest.raises(grpc.RpcError):
            server.stub().Embed(one("w"))
        wait_until(lambda: not greets(address))
    wait_until(lambda: greets(address))
    server.server.ask_to_stop()
    server.call(server.server.serve)  # raises what the watchdog has failed with
    server.call(server.server.drain)
    wait_until(lambda: not greets(address))


def greets(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=5) as connection:
            return connection.recv(100) == GREETING
    except OSError:
        return False


def test_a_hung_engine_is_out_and_its_callers_are_let_go(start: Callable[..., RunningServer], gate: Gate) -> None:
    server = start("--hang-s", "0.5")
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


def test_a_lost_engine_ends_the_service(start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start("--give-up-s", "0.5")
    with monkeypatch.context() as patch:
        patch.setattr(RecurrentEngine, "advance", lambda *_: 1 / 0)
        patch.setattr(RecurrentEngine, "warm_up", lambda *_: 1 / 0)
        with pytest.raises(grpc.RpcError):
            server.stub().Embed(one("w"))
        with pytest.raises(EngineLostError, match="fails"):
            server.call(server.server.serve)


def test_not_serving_before_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def probe(engine: RecurrentEngine[Sentence]) -> None:
        with grpc.insecure_channel(server.target) as channel:
            seen.extend(
                health_stub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status
                for service in SERVICES
            )

    monkeypatch.setattr(RecurrentEngine, "warm_up", probe)
    server = RunningServer(load_config(["--model", "random:tiny", "--listen", "127.0.0.1:0"]))
    server.start()
    server.stop()
    assert seen == [NOT_SERVING, NOT_SERVING]


def is_alive(server: RunningServer) -> bool:
    request = health_pb2.HealthCheckRequest(service=LIVENESS)
    return bool(health_stub(server.channel()).Check(request, timeout=60).status == SERVING)


def stream_of(*words: str) -> list[embed_pb2.EmbedStreamRequest]:
    start = embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=PLAIN))
    item = embed_pb2.StreamItem(id=1, sentence=tokens(*words))
    return [start, embed_pb2.EmbedStreamRequest(item=item)]


def test_reflection_is_there_only_when_asked_for(start: Callable[..., RunningServer]) -> None:
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


@contextmanager
def process(
    *flags: str, launcher: tuple[str, ...] = ("-m", "bilm_server")
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and where it listens, once it is SERVING."""
    command = [sys.executable, *launcher, "--model", "random:tiny", "--drain-delay-s", "0", *flags]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    drain = threading.Thread(target=child.stderr.read)  # a pipe that nobody reads would fill up
    try:
        target = ""
        for line in child.stderr:
            if found := re.search(r"listening on (\S+)", line):
                target = found.group(1)
            if "health: SERVING" in line:
                break
        else:
            raise AssertionError(f"the server ended with {child.wait()}")
        drain.start()
        yield child, target
    finally:
        child.kill()
        child.wait()
        if drain.ident is not None:
            drain.join()
        child.stderr.close()


_HANGS = """
import sys, threading
from bilm_model.engine.engine import RecurrentEngine
from bilm_server.protocols.grpc.health import LIVENESS
from bilm_server.main import main
RecurrentEngine.advance = lambda *_: threading.Event().wait()
sys.exit(main())
"""


def test_a_process_whose_engine_hangs_ends_with_3() -> None:
    flags = ("--listen", "127.0.0.1:0", "--hang-s", "0.5", "--give-up-s", "0.5")
    with process(*flags, launcher=("-c", _HANGS)) as (child, target), grpc.insecure_channel(target) as channel:
        with pytest.raises(grpc.RpcError) as error:
            embed_pb2_grpc.EmbedServiceStub(channel).Embed(one("w"), timeout=60)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert child.wait(240) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(number: signal.Signals) -> None:
    with process("--listen", "127.0.0.1:0") as (child, target), grpc.insecure_channel(target) as channel:
        stub = embed_pb2_grpc.EmbedServiceStub(channel)
        in_flight = stub.Embed.future(
            embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens(*["w"] * 8000), tokens("b")])
        )
        updates = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(updates).status == SERVING
        child.send_signal(number)
        assert next(updates).status == NOT_SERVING
        assert in_flight.result(60).results[1].HasField("embedding")
        updates.cancel()
        assert child.wait(240) == 0


def test_the_grace_time_bounds_the_drain() -> None:
    server = process("--listen", "127.0.0.1:0", "--grace-s", "0.2")
    with server as (child, target), grpc.insecure_channel(target) as channel:
        stay_open = threading.Event()
        never_ending = embed_pb2_grpc.EmbedServiceStub(channel).EmbedStream(unfinished(stay_open))
        assert next(never_ending).rows.last
        child.terminate()
        assert child.wait(25) == 0  # the default would be 30 s
        stay_open.set()


def unfinished(stay_open: threading.Event) -> Iterator[embed_pb2.EmbedStreamRequest]:
    yield from stream_of("w")
    stay_open.wait(60)


def test_a_drain_waits_neither_for_health_watchers_nor_for_reflection(start: Callable[..., RunningServer]) -> None:
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
    server.call(server.server.drain)
    for call in (updates, answers):
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert refusal(error.value)[1] == "SHUTTING_DOWN"
    stay_open.set()


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bilm_server", *flags], capture_output=True, text=True, timeout=240, check=False
    )


def test_a_taken_port_is_an_error(server: RunningServer) -> None:
    found = run("--model", "random:tiny", "--listen", server.target)
    assert found.returncode == 1
    assert f"can't listen on {server.target}" in found.stderr


def test_a_model_that_is_not_there_is_an_error() -> None:
    found = run("--model", "/nowhere/model.safetensors")
    assert (found.returncode, found.stderr.strip()) == (
        1,
        "bilm-serve: /nowhere/model.safetensors: no such file or folder",
    )


def test_a_device_that_is_not_there_is_an_error() -> None:
    found = run("--model", "random:tiny", "--device", "cuda:77")
    assert found.returncode == 1
    assert "cuda:77" in found.stderr


def test_log_lines_can_be_json_and_never_hold_text() -> None:
    import json

    with ThreadPoolExecutor(1) as pool:
        command = [sys.executable, "-m", "bilm_server", "--model", "random:tiny", "--listen", "127.0.0.1:0"]
        child = subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        lines = []
        for line in child.stderr:
            lines.append(json.loads(line))
            if lines[-1]["message"] == "health: SERVING":
                break
        target = next(m["message"].split()[-1] for m in lines if m["message"].startswith("listening on"))
        rest = pool.submit(child.stderr.read)
        with grpc.insecure_channel(target) as channel:
            embed_pb2_grpc.EmbedServiceStub(channel).Embed(one("confidential"))
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGTERM)
        child.wait(240)
        text = rest.result(60)
    assert '"message": "Embed OK' in text
    assert "confidential" not in text
    assert all(json.loads(line) for line in text.splitlines())
    child.stderr.close()


async def test_stop_may_be_called_twice_and_before_start() -> None:
    from bilm_server.app import build_server
    from bilm_server.served_model import load_served_model

    config = load_config(["--model", "random:tiny", "--listen", "127.0.0.1:0"])
    never_started = build_server(config, load_served_model(config))
    await never_started.stop()
    server = build_server(config, load_served_model(config))
    await server.start()
    waiting = asyncio.create_task(server.serve())
    server.ask_to_stop()
    await waiting
    await server.stop()
    await server.stop()
