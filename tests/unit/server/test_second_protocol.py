"""A second door: a toy protocol over `Embedder`, with the tokens, limits, access log and metrics of the first one."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from bilm_api.constants import MAX_RESPONSE_BYTES
from bilm_model.engine.types import Capacity, Engine, OutputSpec
from bilm_model.scalar_mix import Selection
from bilm_server.embedding.admission import Admission, StreamAdmission
from bilm_server.embedding.call_gate import CallGate
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.conversions import Conversions
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.embedding.registry import Registry
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Call, Result, Sentence
from bilm_server.inference.worker import InferenceWorker
from bilm_server.observability.access_log import AccessLog
from bilm_server.observability.call_record import CallRecord
from bilm_server.observability.metrics import Metrics
from bilm_server.security.auth import Authenticator
from bilm_server.security.callers import CallerRights

from tests.support.embedders import worker_of
from tests.support.engines import SumEngine, WholeEngine, token_value
from tests.support.fake_engine import fake_model

TOP = OutputSpec(Selection("top"))
TOKEN = "a-token-of-sixteen"
LIMITS = RequestLimits(
    sentences=8, tokens=8, response_bytes=MAX_RESPONSE_BYTES, sentence_tokens=6, text_bytes=999, stream_items=4
)


class LineProtocol:
    """`TOKEN sentence|sentence` in; `first component of each token|…` out, or the reason of a refusal."""

    def __init__(self, gate: CallGate, models: Registry) -> None:
        self._gate, self._models = gate, models

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer each line of a connection."""
        async for line in reader:
            token, _, text = line.decode().strip().partition(" ")
            record = CallRecord("toy/Embed", "a peer", (("authorization", f"Bearer {token}"),))
            try:
                with self._gate.call(record):
                    embedder, call = self._models.find("", ""), Call()
                    sentences = [Sentence(call, content, TOP) for content in text.split("|")]
                    response = await embedder.embed(sentences, len(line), self)
            except RefusalError as error:
                response = error.reason
            writer.write(f"{response}\n".encode())
        writer.close()

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return what a sentence takes beside its vectors: a number and a space for each token."""
        return 32 * len(sentence.tokens)

    def build(self, _: Sequence[Sentence], results: Sequence[Result | RefusalError]) -> str:
        """Return the response line."""
        return "|".join(each.reason if isinstance(each, RefusalError) else _numbers(each) for each in results)


def _numbers(result: Result) -> str:
    vectors: Any = result.vectors
    return " ".join(f"{vector[0]:g}" for vector in vectors)


class Door:
    """A server of the toy protocol, and a client of it."""

    def __init__(self, engine: Engine[Any], token_file: Path) -> None:
        model = fake_model(engine)
        self.metrics = Metrics([model.name])
        limits = CallerLimits(tokens_per_s=0, max_calls=1, largest_request_tokens=LIMITS.tokens)
        self.embedder = Embedder(
            model=model,
            worker=InferenceWorker(engine, lambda done: self.metrics.round(model.name, done.rows, done.failed)),
            limits=LIMITS,
            conversions=Conversions(),
            admission=Admission(LIMITS.tokens, MAX_RESPONSE_BYTES),
            stream_admission=StreamAdmission(LIMITS.tokens, MAX_RESPONSE_BYTES),
            caller_limits=limits,
        )
        authenticator = Authenticator(token_file)
        authenticator.load()
        gate = CallGate(authenticator, CallerRights((), True), limits, (AccessLog(), self.metrics))
        self.protocol = LineProtocol(gate, Registry(LIMITS, self.embedder.conversions, [self.embedder]))

    async def ask(self, *lines: str) -> list[str]:
        """Return the response to each line, sent over one connection."""
        async with asyncio.timeout(20), await asyncio.start_server(self.protocol.serve, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                writer.write("".join(f"{line}\n" for line in lines).encode())
                return [(await reader.readline()).decode().strip() for _ in lines]
            finally:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()


@asynccontextmanager
async def opened(engine: Engine[Any], folder: Path) -> AsyncIterator[Door]:
    token_file = folder / "tokens"
    token_file.write_text(f"team-a {TOKEN}\n", encoding="utf-8")
    token_file.chmod(0o600)
    door = Door(engine, token_file)
    await worker_of(door.embedder).start()
    try:
        yield door
        assert door.embedder.idle
    finally:
        await worker_of(door.embedder).stop()
        door.embedder.conversions.stop()


@pytest.mark.parametrize("new_engine", [SumEngine, WholeEngine])
async def test_a_protocol_of_its_own_has_all_that_the_first_one_has(
    new_engine: Callable[[Capacity], Engine[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = token_value("a"), token_value("b")
    expected = [a, a + b] if new_engine is SumEngine else [a / (a + b), b / (a + b)]
    with caplog.at_level(logging.INFO, "bilm_server.observability.access_log"):
        async with opened(new_engine(Capacity(4, 40)), tmp_path) as door:
            found = await door.ask(
                f"{TOKEN} a b|a", "wrong-token a", f"{TOKEN} {'w ' * 9}", f"{TOKEN} a a a a a a|a a a a a a"
            )
            registry = door.metrics.registry
            counts = {
                code: registry.get_sample_value(
                    "bilm_requests_total", {"method": "toy/Embed", "code": code, "model": model}
                )
                for code, model in (("OK", "fake"), ("UNAUTHENTICATED", ""), ("INVALID_ARGUMENT", "fake"))
            }
            tokens = registry.get_sample_value("bilm_tokens_total", {"model": "fake"})
    first, *refused = found
    assert [float(number) for number in first.partition("|")[0].split()] == pytest.approx(expected, rel=1e-4)
    assert refused == ["UNAUTHENTICATED", "SENTENCE_TOO_LONG", "TOO_MANY_TOKENS"]
    assert counts == {"OK": 2.0, "UNAUTHENTICATED": 1.0, "INVALID_ARGUMENT": 1.0}
    assert tokens == 3.0
    lines = [record.__dict__["fields"] for record in caplog.records]
    assert [(line["code"], line.get("caller"), line["sentences"]) for line in lines] == [
        ("OK", "team-a", 2), ("UNAUTHENTICATED", None, 0), ("OK", "team-a", 1), ("INVALID_ARGUMENT", "team-a", 0)
    ]  # fmt: skip
