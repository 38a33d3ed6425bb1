"""Whatever becomes of calls, the server holds nothing for them afterwards."""

import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from bilm_api.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from bilm_api.v1 import embed_pb2
from bilm_server.inference.worker import WorkerTiming

from tests.integration.integration_support import PLAIN, tokens
from tests.integration.test_embed import refusal
from tests.integration.test_stream import item, start_message
from tests.support.http_calls import connected, embeddings, raw_request
from tests.support.processes import wait_until
from tests.support.servers import LoopServer, wait_for_nothing
from tests.support.tensors import texts as infer_texts
from tests.support.tensors import tokens as infer_tokens

SIX = embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens("one", "of", "six")] * 6)


def test_sixty_late_calls_of_six_sentences(start: Callable[..., LoopServer]) -> None:
    """On the clock of the model's thread their deadlines have passed: they are refused in the queue, not by gRPC."""
    ahead_s = 3600.0
    server = start(worker={"clock": lambda: time.monotonic() + ahead_s})
    stub = server.stub()
    calls: list[Any] = [stub.Embed.future(SIX, timeout=30) for _ in range(60)]
    for call in calls:
        assert refusal(call.exception(20))[1] == "DEADLINE_EXCEEDED"
    late = list(stub.EmbedStream(iter([start_message(), *(item(i, tokens("a")) for i in range(20))]), timeout=30))
    assert len(late) == 20
    server.check_nothing_is_left()
    ahead_s = 0.0
    assert len(server.stub().Embed(SIX).results) == 6


def test_calls_and_streams_that_are_cancelled_at_any_moment(
    server: LoopServer, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(7)
    stub = server.stub()
    texts = [embed_pb2.Sentence(text="Some words, and more. " * 40) for _ in range(6)]
    requests = [SIX, embed_pb2.EmbedRequest(options=PLAIN, sentences=texts)]
    messages = [start_message(), *(item(i, chance.choice(texts)) for i in range(30))]
    for number in range(120):
        deadline_s = chance.choice((None, 0.001, 0.01, 0.03))
        if number % 3:
            call: Any = stub.Embed.future(chance.choice(requests), timeout=deadline_s)
        else:
            call = stub.EmbedStream(iter(messages), timeout=deadline_s)
        if chance.random() < 0.5:
            time.sleep(chance.random() * 0.01)  # so that any step of the call may be the one that is interrupted
        call.cancel()
    server.check_nothing_is_left()
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_calls_of_the_open_inference_protocol_that_are_cancelled_at_any_moment(server: LoopServer) -> None:
    chance = random.Random(11)
    stub: Any = GRPCInferenceServiceStub(server.channel())
    requests = [infer_texts(*["Some words, and more. " * 40] * 6), infer_tokens(*[["one", "of", "six"]] * 6)]
    for _ in range(120):
        call = stub.ModelInfer.future(chance.choice(requests), timeout=chance.choice((None, 0.001, 0.01, 0.03)))
        if chance.random() < 0.5:
            time.sleep(chance.random() * 0.01)
        call.cancel()
    server.check_nothing_is_left()


def test_http_clients_that_leave_at_any_moment(
    start: Callable[..., LoopServer], caplog: pytest.LogCaptureFixture
) -> None:
    server, chance = start("--http-listen", "127.0.0.1:0"), random.Random(13)
    texts = ["Some words, and more. " * 40] * 6
    requests = [raw_request("/v1/embeddings", {"input": texts})]
    requests.append(raw_request("/v1/embed", {"sentences": [{"text": text} for text in texts]}))
    for number in range(120):
        request = chance.choice(requests) * chance.choice((1, 1, 3))
        with connected(server.http.address) as connection:
            connection.sendall(request if number % 3 else request[: chance.randrange(len(request))])
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.01)
            if chance.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    server.check_nothing_is_left()
    wait_for_nothing("connections", lambda: server.http.n_connections)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    assert embeddings(server.http.address, {"input": "a"}).status == 200


def test_an_engine_that_fails_now_and_then(start: Callable[..., LoopServer]) -> None:
    chance = random.Random(3)
    server = start(worker={"timing": WorkerTiming(probe_s=0.01)})

    def sometimes(share: float) -> None:
        if chance.random() < share:
            raise RuntimeError("simulated")

    hooks: dict[str, Callable[..., None]] = {
        "advance": lambda: sometimes(0.1),
        "join": lambda _: sometimes(0.02),
        "joined": lambda: sometimes(0.02),  # it is in, and nobody knows
        "drop": lambda: sometimes(0.3),
        "warm_up": lambda: sometimes(0.1),
    }
    with server.engine.hooked(**hooks):
        stub = server.stub()
        calls: list[Any] = []
        for number in range(60):
            calls.append(stub.Embed.future(SIX, timeout=20))
            if number % 5 == 0:
                calls[chance.randrange(len(calls))].cancel()
            if number % 10 == 0:
                stream = stub.EmbedStream(iter([start_message(), *(item(i, tokens("a", "b")) for i in range(9))]))
                if number % 20:
                    stream.cancel()
            if number % 15 == 0:
                time.sleep(0.01)
        for call in calls:
            if not call.cancelled():
                call.exception()
    wait_until(lambda: server.worker.healthy, "the model works again", 20)
    assert len(server.stub().Embed(SIX).results) == 6
    server.check_nothing_is_left()
