"""The HTTP door on a fake engine: its limits in time, size and number, certificates, loading and draining."""

import asyncio
import http.client
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from bilm_api.constants import Reason
from bilm_model.engine.types import DataType, OutputSpec, State
from bilm_model.scalar_mix import Pooling, Selection
from bilm_server.errors import Code, ConfigurationError, RefusalError
from bilm_server.inference.types import Call, Result, Sentence
from bilm_server.protocols.grpc.connections import http_share
from bilm_server.protocols.http.door import HttpDoor
from bilm_server.protocols.http.embed_responses import JsonFormat, RawTensors
from bilm_server.protocols.http.embeddings import EmbeddingsFormat
from bilm_server.protocols.http.encodings import Encoding
from bilm_server.protocols.http.hosts import AllowedHosts, split_target
from bilm_server.protocols.http.messages import HttpRefusalError, HttpRequest, HttpResponse, refused
from bilm_server.security.tls import server_contexts

from tests.security.tls_support import Authority, replace
from tests.support.embedders import until
from tests.support.fake_engine import FakeEngine, fake_model
from tests.support.http_calls import call_on
from tests.support.http_doors import opened

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


async def test_damaged_files_leave_the_certificate_in_use(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = authority.issue("first").write(tmp_path, "server")
    trusting = client_context(tmp_path, authority)
    async with opened(tls=lambda: server_contexts(certificate, key)) as it:
        for damaged in (b"", authority.issue("second").certificate_pem):  # the second one has another key
            replace(certificate, damaged)
            assert (await it.embeddings(tls=trusting)).status == 200
        assert caplog.text.count("what was loaded before stays in use") == 2


@pytest.mark.parametrize("sent", [b"", b"GET /v1/mo", b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"])
async def test_tls_clients_that_stop_are_let_go(authority: Authority, tmp_path: Path, sent: bytes) -> None:
    """In their handshake, in their request, and without reading."""
    certificate, key = authority.issue("server").write(tmp_path, "server")
    trusting = client_context(tmp_path, authority)
    contexts = server_contexts(certificate, key)

    async def answer(_: HttpRequest) -> HttpResponse:
        return HttpResponse(b"x" * 2**24)

    async with opened(tls=lambda: contexts, stall_s=0.05, request_timeout_s=0.05, loaded=False) as it:
        it.app.open({"http/models": answer})
        with await it.connect() as plain:
            if sent:
                connection = await asyncio.to_thread(trusting.wrap_socket, plain, server_hostname="localhost")
                connection.sendall(sent)
                await until(lambda: it.door.n_connections == 0)
                connection.close()
            else:
                plain.sendall(b"\x16\x03\x01")  # of a hello, and no more of it
                await until(lambda: it.door.n_connections == 1)
                await it.door.drain(60.0)
        assert it.door.n_connections == 0


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
        (RefusalError(Reason.RIGHT_MISSING, ""), 403, {}),
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


@pytest.mark.parametrize(
    ("names", "host", "status"),
    [
        (["Bilm.Example", "[::1]"], "bilm.example:8080", 0),
        (["Bilm.Example", "[::1]"], "[::1]", 0),
        (["Bilm.Example", "[::1]"], "[::1]:80", 0),
        (["Bilm.Example", "[::1]"], "localhost", 421),
        (["Bilm.Example", "[::1]"], "", 421),
        (["*"], "anything:1", 0),
        (["*"], "any thing", 400),
        ([], "127.1.2.3:1", 0),
        ([], "localhost:", 0),
        ([], "127.0.0.1.example", 421),
        ([], "localhost/", 400),
    ],
)
def test_hosts(names: list[str], host: str, status: int) -> None:
    allowed = AllowedHosts(names)
    if not status:
        allowed.check(host)
        return
    with pytest.raises(HttpRefusalError) as found:
        allowed.check(host)
    assert found.value.status == status


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/v1/a%20b", (None, "/v1/a b")),
        ("http://bilm.example:80/v1/embed", ("bilm.example:80", "/v1/embed")),
        ("HTTPS://a", ("a", "/")),
        ("http:///v1", ("", "/v1")),
        ("ftp://a/b", (None, "ftp://a/b")),
        ("*", (None, "*")),
    ],
)
def test_targets(target: str, expected: tuple[str | None, str]) -> None:
    assert split_target(target) == expected


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
