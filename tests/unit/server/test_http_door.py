"""The HTTP door on a fake engine: its limits in time, size and number, certificates, loading and draining."""

import asyncio
import http.client
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from bilm_api.constants import MAX_REQUEST_BYTES, Reason
from bilm_model.engine.types import DataType, OutputSpec, State
from bilm_model.scalar_mix import Pooling, Selection
from bilm_server.embedding.call_gate import CallGate
from bilm_server.errors import Code, ConfigurationError, RefusalError
from bilm_server.inference.types import Call, Result, Sentence
from bilm_server.protocols.grpc.connections import http_share
from bilm_server.protocols.http.bodies import Bodies
from bilm_server.protocols.http.door import HttpDoor
from bilm_server.protocols.http.embed_responses import JsonFormat, RawTensors
from bilm_server.protocols.http.embeddings import EmbeddingsFormat
from bilm_server.protocols.http.encodings import Encoding
from bilm_server.protocols.http.endpoints import endpoints_of
from bilm_server.protocols.http.hosts import AllowedHosts
from bilm_server.protocols.http.messages import HttpRequest, HttpResponse, refused
from bilm_server.protocols.http.routing import HttpApp
from bilm_server.security.auth import Authenticator
from bilm_server.security.callers import CallerRights
from bilm_server.security.tls import server_contexts

from tests.security.tls_support import Authority
from tests.support.embedders import NO_LIMITS, embedding, until
from tests.support.fake_engine import FakeEngine, fake_model
from tests.support.http_calls import Answer, call, call_on, connected, embeddings, read_to_end
from tests.support.served import EndedCalls

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
ONE = {"input": "a"}


@dataclass
class Opened:
    """A door that listens.

    Attributes:
        door: itself.
        app: behind it.
        ended: its calls.
    """

    door: HttpDoor
    app: HttpApp
    ended: EndedCalls

    async def embeddings(self, body: object = ONE, **options: Any) -> Answer:
        """Call it from a thread."""
        return await asyncio.to_thread(embeddings, self.door.address, body, **options)

    async def get(self, path: str) -> Answer:
        """Call it from a thread."""
        return await asyncio.to_thread(call, self.door.address, "GET", path)

    async def connect(self) -> socket.socket:
        """Return a connection to it."""
        return await asyncio.to_thread(connected, self.door.address)


@asynccontextmanager
async def opened(
    *,
    engine: FakeEngine[Sentence] | None = None,
    max_connections: int = 8,
    loaded: bool = True,
    stall_s: float = 60.0,
    bodies: Bodies | None = None,
    **settings: Any,
) -> AsyncIterator[Opened]:
    """Yield a door that listens; nothing of a call may be left when it ends.

    Args:
        engine: what computes.
        max_connections: at a time.
        loaded: whether the model is.
        stall_s: that a client may take to read.
        bodies: receives them.
        settings: of the door.
    """
    ended = EndedCalls()
    async with embedding(engine or FakeEngine()) as embedder:
        gate = CallGate(Authenticator(None), CallerRights((), authenticated=False), NO_LIMITS, [ended])
        app = HttpApp(gate, lambda: loaded, (), stall_s, bodies=bodies)
        settings = {"tls": lambda: None, **settings}
        door = HttpDoor("127.0.0.1:0", app, lambda: max_connections, **settings)
        await door.start()
        if loaded:
            app.open(endpoints_of(embedder))
        try:
            yield Opened(door, app, ended)
        finally:
            await door.stop()
        assert door.n_connections == 0


# ---- limits ----


@pytest.mark.parametrize("sent", [b"", b"POST /v1/em", HEAD, HEAD + b"content-length: 9\r\n\r\n{"])
async def test_a_slow_sender_is_let_go(sent: bytes) -> None:
    async with opened(request_timeout_s=0.05) as it:
        with await it.connect() as connection:
            connection.sendall(sent)
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == (b"HTTP/1.1 408" if sent.endswith(b"{") else b"")
        assert (await it.embeddings()).status == 200


async def test_a_body_that_drips_behind_its_refusal_is_let_go() -> None:
    async with opened(request_timeout_s=0.05) as it:
        with await it.connect() as connection:
            connection.sendall(b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == b"HTTP/1.1 404"


async def test_the_time_of_a_request_is_not_that_of_its_call() -> None:
    engine = FakeEngine[Sentence]()
    engine.go_on.clear()
    async with opened(engine=engine, request_timeout_s=0.01) as it:
        calling = asyncio.create_task(it.embeddings())
        await asyncio.to_thread(engine.computing.wait, 60)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await until(lambda: loop.time() > begun_s + 1.2)  # later than the connection's own timer
        engine.go_on.set()
        assert (await calling).status == 200


async def test_a_client_that_reads_nothing_is_let_go() -> None:
    large = HttpResponse(b"x" * 2**24)

    async def answer(_: HttpRequest) -> HttpResponse:
        return large

    async with opened(stall_s=0.05, loaded=False) as it:
        it.app.open({"http/models": answer})
        with await it.connect() as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await until(lambda: bool(it.ended.records) and it.door.n_connections == 0)
        (record,) = it.ended.records
        assert record.code is Code.OK
        assert len((await it.get("/v1/models")).body) == 2**24


async def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    async with opened(max_connections=2) as it:
        kept = [await it.connect(), await it.connect()]
        await until(lambda: it.door.n_connections == 2)
        with await it.connect() as third:
            assert await asyncio.to_thread(read_to_end, third) == b""
        kept.pop().close()
        await until(lambda: it.door.n_connections == 1)
        assert (await it.embeddings()).status == 200
        kept.pop().close()


async def test_bodies_have_a_bound_together() -> None:
    async with opened(bodies=Bodies(max_arriving_bytes=100_000)) as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"content-length: 300000\r\n\r\n" + b" " * 200_000)
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == b"HTTP/1.1 429"
        assert b"retry-after-ms: 1000" in answer
        assert (await it.embeddings()).status == 200


async def test_a_client_that_leaves_within_its_body_is_cancelled() -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"content-length: 300000\r\n\r\n{")
            await until(lambda: it.door.n_connections == 1)
        await until(lambda: bool(it.ended.records))
        assert [record.code for record in it.ended.records] == [Code.CANCELLED]


async def test_a_body_that_is_announced_as_too_large_is_not_waited_for() -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % (100 * MAX_REQUEST_BYTES))
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == b"HTTP/1.1 413"


async def test_calls_in_one_write_are_answered_in_their_order() -> None:
    async with opened() as it:
        bodies = [b'{"input":"a"}', b"{", b'{"input":"b"}']
        with await it.connect() as connection:
            connection.sendall(b"".join(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body for body in bodies[:2]))
            connection.sendall(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(bodies[2]) + bodies[2])
            answer = await asyncio.to_thread(read_to_end, connection)
        assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400", b"200"]


# ---- life ----


async def test_while_the_model_loads() -> None:
    async with opened(loaded=False) as it:
        answer = await it.embeddings()
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "MODEL_LOADING", "1")
        assert (await it.get("/healthz")).status == 200
        assert (await it.get("/readyz")).status == 503
        assert [(record.code, record.reason) for record in it.ended.records] == [(Code.UNAVAILABLE, "MODEL_LOADING")]


async def test_a_fault_of_an_endpoint_shows_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: HttpRequest) -> HttpResponse:
        raise ZeroDivisionError("a secret")

    async with opened(loaded=False) as it:
        it.app.open({"http/models": fail})
        answer = await it.get("/v1/models")
    assert (answer.status, answer.code) == (500, "INTERNAL")
    assert b"secret" not in answer.body
    assert "http/models failed" in caplog.text


async def test_what_outlives_the_grace_time_is_aborted() -> None:
    engine = FakeEngine[Sentence]()
    engine.go_on.clear()
    async with opened(engine=engine) as it:
        calling = asyncio.create_task(it.embeddings())
        await asyncio.to_thread(engine.computing.wait, 60)
        await it.door.drain(0.05)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            await calling
        engine.go_on.set()
        assert [record.code for record in it.ended.records] == [Code.CANCELLED]


async def test_a_second_listener_on_the_address_is_refused() -> None:
    async with opened() as it:
        other = HttpDoor(it.door.address, it.app, lambda: 1, lambda: None)
        with pytest.raises(Exception, match="http_listen: can't listen on"):
            await other.start()


# ---- TLS ----


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def client_context(folder: Path, authority: Authority, name: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.write(folder)))
    if name:
        context.load_cert_chain(*authority.issue(name, for_host=False).write(folder, f"client-{name}"))
    return context


async def test_tls_follows_its_files(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("first").write(tmp_path, "server")
    trusting = client_context(tmp_path, authority)
    async with opened(tls=lambda: server_contexts(certificate, key)) as it:
        assert (await it.embeddings(tls=trusting)).status == 200
        with pytest.raises((http.client.BadStatusLine, ConnectionError)):  # without TLS nothing is answered
            await it.embeddings()
        other = Authority()
        other.issue("second").write(tmp_path, "server")
        with pytest.raises(ssl.SSLCertVerificationError):
            await it.embeddings(tls=trusting)
        assert (await it.embeddings(tls=client_context(tmp_path, other))).status == 200
        await until(lambda: it.door.n_connections == 0)


async def test_callers_certificates_name_them(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("server").write(tmp_path, "server")
    contexts = server_contexts(certificate, key, authority.write(tmp_path))
    async with opened(tls=lambda: contexts) as it:
        assert (await it.embeddings(tls=client_context(tmp_path, authority, "team-a"))).status == 200
        assert [record.caller for record in it.ended.records] == ["team-a"]
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await it.embeddings(tls=client_context(tmp_path, authority))
        await until(lambda: it.door.n_connections == 0)
    assert len(it.ended.records) == 1


def test_bad_files_of_tls(authority: Authority, tmp_path: Path) -> None:
    certificate, _ = authority.issue("one").write(tmp_path, "one")
    _, key = authority.issue("two").write(tmp_path, "two")
    with pytest.raises(ConfigurationError, match="not a certificate chain and the key that belongs to it"):
        server_contexts(certificate, key)


def test_without_the_extra_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["uvicorn"] = None
from bilm_server.main import main
sys.exit(main(["--http-listen", "127.0.0.1:0", "--model", "random:tiny", *sys.argv[1:]]))
"""
    for flags, code in (([], 1), (["--check-config"], 2)):
        command = [sys.executable, "-c", program, *flags]
        found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
        expected = "bilm-serve: http_listen: needs the extra `http`: pip install 'bilm-serve[http]'"
        assert (found.returncode, found.stderr.splitlines()[-1:]) == (code, [expected])


# ---- pure ----


@pytest.mark.parametrize(
    ("refusal", "status", "headers"),
    [
        (RefusalError(Reason.OVERLOADED, "", 1500), 429, {"retry-after-ms": "1500", "retry-after": "2"}),
        (RefusalError(Reason.RESPONSE_TOO_LARGE, ""), 429, {"x-should-retry": "false"}),
        (RefusalError(Reason.MODEL_VERSION_MISMATCH, ""), 400, {}),
        (RefusalError(Reason.MODEL_FAILING, ""), 503, {}),
        (RefusalError(Reason.UNAUTHENTICATED, ""), 401, {"www-authenticate": "Bearer"}),
    ],
)
def test_refusals_as_responses(refusal: RefusalError, status: int, headers: dict[str, str]) -> None:
    found = refused(refusal)
    assert (found.status, found.headers) == (status, headers)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_bound_of_a_response_holds(encoding: Encoding) -> None:
    model, output = fake_model(FakeEngine[Any]()), OutputSpec(Selection("top", "mean"))
    width = model.config.width
    sentences = [Sentence(Call(), None, output, tokens=("a",)) for _ in range(50)]
    vector = np.full(width, -1.1754944e-38, np.float32)
    wire = EmbeddingsFormat(model, encoding)
    body = wire.build(sentences, [Result(vector, None, 0.0, 0.0) for _ in sentences])
    bound = sum(4 * width + wire.overhead_bytes(sentence) for sentence in sentences)
    assert bound / 2 < len(body) <= bound + 256


@pytest.mark.parametrize("pooling", ["none", "mean"])
@pytest.mark.parametrize("data_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_the_bound_of_an_embed_holds(pooling: Pooling, data_type: DataType, encoding: Encoding | None) -> None:
    model = fake_model(FakeEngine[Any]())
    output = OutputSpec(Selection("all", pooling), data_type)
    tokens = ("\x01" * 48, "ü" * 20)
    places = (4_000_000_000, 4_000_000_000)
    sentences = [
        Sentence(Call(), None, output, b"", True, tokens=tokens, starts=places, ends=places) for _ in range(20)
    ]
    shape = (3, 4) if pooling == "mean" else (3, 2, 4)
    kind = np.float32 if data_type == "float32" else np.int16
    values = np.full(shape, -1.1754944e-38, np.float32) if kind is np.float32 else np.full(shape, -32639, np.int16)
    results = [Result(values, cast(State, 7), 0.0, 0.0) for _ in sentences]
    wire = RawTensors(model, False) if encoding is None else JsonFormat(model, False, encoding)
    body = wire.build(sentences, results)
    bound = sum(values.nbytes + model.state_bytes + wire.overhead_bytes(sentence) for sentence in sentences)
    assert bound / 4 < len(body) <= bound + 512


def test_hosts() -> None:
    named = AllowedHosts(["Bilm.Example", "[::1]"])
    assert "bilm.example:8080" in named
    assert "[::1]" in named
    assert "[::1]:80" in named
    assert "localhost" not in named
    assert "" not in named
    assert "anything" in AllowedHosts(["*"])
    assert "127.1.2.3:1" in AllowedHosts([])
    assert "127.0.0.1.example" not in AllowedHosts([])


def test_shares_of_the_connections() -> None:
    assert [http_share(total) for total in (2, 3, 10_000)] == [1, 1, 5000]
    with pytest.raises(ConfigurationError, match="expected 2 or more"):
        http_share(1)


async def test_a_kept_connection_ends_with_the_drain_behind_its_call() -> None:
    async with opened() as it:
        host, _, port = it.door.address.rpartition(":")
        kept = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            assert (await asyncio.to_thread(call_on, kept, "GET", "/v1/models")).status == 200
            await it.door.drain(60.0)
            assert kept.sock.recv(1) == b""
        finally:
            kept.close()


async def test_encoded_bodies_are_refused() -> None:
    async with opened() as door:
        answer = await door.embeddings(headers={"content-encoding": "gzip"})
    assert answer.status == 415


async def test_two_lengths_of_one_body_are_refused_and_end_the_connection() -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    async with opened() as door:
        connection = await door.connect()
        with connection:
            both = head + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            connection.sendall(both)
            answer = await asyncio.to_thread(read_to_end, connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"expected one of them" in answer
