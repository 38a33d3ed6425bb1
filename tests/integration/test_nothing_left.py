"""Whatever becomes of calls, the server holds nothing for them afterwards."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from bilm_api.v1 import embed_pb2
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.types import Capacity, EngineResult
from bilm_server.inference.types import Sentence
from bilm_server.inference.worker import InferenceWorker, WorkerTiming

from tests.integration.integration_support import PLAIN, RunningServer, tokens
from tests.integration.test_embed import refusal
from tests.integration.test_stream import item, start_message

SIX = embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens("one", "of", "six")] * 6)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the server still holds something"
        time.sleep(0.002)


def check_nothing_is_left(server: RunningServer) -> None:
    """Waiting, in flight and reserved: all 0, in the thread, the engine and the rooms."""
    embedder = server.server.embedder
    engine = embedder.model.engine
    wait_until(lambda: embedder.idle)
    assert (engine.in_flight, engine.used) == (0, Capacity(0, 0))


def test_sixty_late_calls_of_six_sentences(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the clock of the model's thread their deadlines have passed: they are refused in the queue, not by gRPC."""
    with monkeypatch.context() as patch:
        patch.setattr(server.server.embedder.worker, "_clock", lambda: time.monotonic() + 3600)
        stub = server.stub()
        calls: list[Any] = [stub.Embed.future(SIX, timeout=30) for _ in range(60)]
        for call in calls:
            assert refusal(call.exception(20))[1] == "DEADLINE_EXCEEDED"
        late = list(stub.EmbedStream(iter([start_message(), *(item(i, tokens("a")) for i in range(20))]), timeout=30))
        assert len(late) == 20
        check_nothing_is_left(server)
    assert len(server.stub().Embed(SIX).results) == 6


def test_calls_and_streams_that_are_cancelled_at_any_moment(
    server: RunningServer, caplog: pytest.LogCaptureFixture
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
    check_nothing_is_left(server)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_an_engine_that_fails_now_and_then(
    start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(3)
    quick = partial(InferenceWorker, timing=WorkerTiming(probe_s=0.01))
    monkeypatch.setattr("bilm_server.app.InferenceWorker", quick)
    server = start()
    advance, join = RecurrentEngine.advance, RecurrentEngine.join
    leave, probe = RecurrentEngine.drop, RecurrentEngine.warm_up

    def sometimes(share: float) -> None:
        if chance.random() < share:
            raise RuntimeError("simulated")

    def failing_advance(engine: RecurrentEngine[Sentence]) -> list[EngineResult[Sentence]]:
        sometimes(0.1)
        return advance(engine)

    def failing_join(engine: RecurrentEngine[Sentence], sentences: Sequence[Sentence]) -> None:
        sometimes(0.02)
        join(engine, sentences)
        sometimes(0.02)  # it is in, and nobody knows

    def failing_leave(engine: RecurrentEngine[Sentence], sentences: Sequence[Sentence]) -> None:
        sometimes(0.3)
        leave(engine, sentences)

    def failing_probe(engine: RecurrentEngine[Sentence]) -> None:
        sometimes(0.1)
        probe(engine)

    with monkeypatch.context() as patch:
        for name, function in {
            "advance": failing_advance,
            "join": failing_join,
            "drop": failing_leave,
            "warm_up": failing_probe,
        }.items():
            patch.setattr(RecurrentEngine, name, function)
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
    wait_until(lambda: server.server.embedder.worker.healthy)
    assert len(server.stub().Embed(SIX).results) == 6
    check_nothing_is_left(server)
