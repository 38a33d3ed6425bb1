"""The HTTP door on a real server: its answers, its refusals, and what it shares with gRPC."""

import base64
import http.client
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from bilm_api.constants import MAX_REQUEST_BYTES
from bilm_api.v1 import embed_pb2

from tests.integration.integration_support import options
from tests.support.http_calls import call, call_on, connected, embeddings, read_to_end
from tests.support.servers import LoopServer, serving, wait_for_nothing

TEXTS = ["The bank by the river was steep .", "a", "Ünïcödé wörds", "She works at a bank ."]
HTTP = ("--http-listen", "127.0.0.1:0")
BAD_HOSTS = ("localhost:abc", "localhost:80:80", "[::1]x", "[::1", "::1", "[localhost]", "[127.0.0.1]", "me@localhost")


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving(*HTTP) as server:
        yield server


@pytest.fixture
def address(server: LoopServer) -> str:
    return server.http.address


def embedded(server: LoopServer, texts: Sequence[str], **changes: Any) -> list[bytes]:
    """Return the vectors of `Embed`, as bytes."""
    request = embed_pb2.EmbedRequest(
        options=options(**{"layers": embed_pb2.LAYERS_TOP, "pooling": embed_pb2.POOLING_MEAN, **changes}),
        sentences=[embed_pb2.Sentence(text=text) for text in texts],
    )
    return [result.embedding.tensor.data for result in server.stub().Embed(request).results]


# ---- answers ----


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"layers": "average"}, {"layers": embed_pb2.LAYERS_AVERAGE}),
        ({"pooling": "max"}, {"pooling": embed_pb2.POOLING_MAX}),
        ({"l2_normalize": True}, {"l2_normalize": True}),
        ({"priority": "batch"}, {}),
    ],
)
def test_the_bits_of_embed(server: LoopServer, address: str, fields: dict[str, Any], changes: dict[str, Any]) -> None:
    expected = embedded(server, TEXTS, **changes)
    asked = {"input": TEXTS, "model": server.model.name, "user": "someone", **fields}
    packed = embeddings(address, {**asked, "encoding_format": "base64"}).json
    listed = embeddings(address, asked).json
    assert [base64.b64decode(item["embedding"]) for item in packed["data"]] == expected
    assert [np.array(item["embedding"], np.float32).tobytes() for item in listed["data"]] == expected
    assert [(item["object"], item["index"]) for item in packed["data"]] == [("embedding", i) for i in range(4)]
    assert {name: value for name, value in packed.items() if name != "data"} == {
        "object": "list", "model": server.model.name, "usage": listed["usage"]
    }  # fmt: skip
    assert packed["usage"] == {"prompt_tokens": 17, "total_tokens": 17}


def test_floats_are_the_shortest_that_are_the_same_float32(address: str) -> None:
    answer = embeddings(address, {"input": TEXTS[0]})
    numbers = answer.body.partition(b'"embedding":[')[2].partition(b"]")[0].split(b",")
    values = [np.float32(number) for number in numbers]
    assert [float(number) for number in numbers] == [float(str(value)) for value in values]
    assert max(map(len, numbers)) < 16


def test_one_text_the_other_path_and_the_width(server: LoopServer, address: str) -> None:
    width = server.model.config.width
    asked = {"input": TEXTS[0], "dimensions": width, "encoding_format": "base64", "model": None}
    first, second = embeddings(address, asked), call(address, "POST", "/embeddings", asked)
    assert first.status == second.status == 200
    assert first.body == second.body
    assert len(base64.b64decode(first.json["data"][0]["embedding"])) == 4 * width


def test_a_large_request_and_a_large_response(server: LoopServer, address: str) -> None:
    texts = [f"sentence number {number} of many , many words" for number in range(1000)]
    packed = embeddings(address, {"input": texts, "encoding_format": "base64"}).json
    assert [base64.b64decode(item["embedding"]) for item in packed["data"]] == embedded(server, texts)


def test_models(server: LoopServer, address: str) -> None:
    found = call(address, "GET", "/v1/models").json
    (model,) = found["data"]
    assert found["object"] == "list"
    assert (model["id"], model["object"], model["version"]) == (server.model.name, "model", server.model.version)
    assert model["width"] == server.model.config.width
    assert call(address, "GET", f"/v1/models/{server.model.name}").json == model
    missing = call(address, "GET", "/v1/models/another")
    assert (missing.status, missing.code) == (404, "MODEL_NOT_FOUND")


def test_a_connection_serves_many_calls(address: str) -> None:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        answers = [call_on(connection, "POST", "/v1/embeddings", {"input": "a b"}) for _ in range(20)]
        answers.append(call_on(connection, "GET", "/v1/models"))
        answers += [call_on(connection, "POST", "/v1/embeddings", {"input": ""}), call_on(connection, "GET", "/x")]
    finally:
        connection.close()
    assert [answer.status for answer in answers] == [200] * 21 + [400, 404]
    assert len({answer.body for answer in answers[:20]}) == 1


def test_health_needs_no_known_host(address: str) -> None:
    for path in ("/healthz", "/readyz"):
        assert call(address, "GET", path, headers={"host": "10.1.2.3:8080"}).status == 200
        assert call(address, "HEAD", path).body == b""


def test_a_call_is_logged_and_has_its_name(address: str, server: LoopServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bilm_server.observability.access_log"):
        answer = embeddings(address, {"input": TEXTS}, headers={"x-request-id": "mine-1"})
        call(address, "GET", "/a/secret")
        embeddings(address, {"input": TEXTS}, headers={"x-bilm-no-log": "1"})
    assert answer.headers["x-request-id"] == "mine-1"
    lines = [record.__dict__["fields"] for record in caplog.records]
    assert [(line["method"], line["code"], line["sentences"], line.get("request_id")) for line in lines] == [
        ("http/embeddings", "OK", 4, "mine-1"), ("unknown", "UNIMPLEMENTED", 0, None)
    ]  # fmt: skip
    assert (lines[0]["tokens"], lines[0]["caller"], lines[0]["model"]) == (17, "127.0.0.1", server.model.name)
    assert lines[0]["peer"].startswith("ipv4:127.0.0.1:")


# ---- refusals ----


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "MALFORMED_REQUEST", "input"),
        ({"input": None}, "MALFORMED_REQUEST", "input"),
        ({"input": {}}, "MALFORMED_REQUEST", "input"),
        ({"input": True}, "MALFORMED_REQUEST", "input"),
        ({"input": [1, 2]}, "MALFORMED_REQUEST", "input"),
        ({"input": [[1, 2]]}, "MALFORMED_REQUEST", "input"),
        ({"input": ["a", 1]}, "MALFORMED_REQUEST", "input[1]"),
        ({"input": [None]}, "MALFORMED_REQUEST", "input[0]"),
        ({"input": ""}, "POOLING_EMPTY", "input[0]"),
        ({"input": ["a", ""]}, "POOLING_EMPTY", "input[1]"),
        ({"input": ["a", " \n"]}, "POOLING_EMPTY", None),
        ({"input": []}, "SENTENCES_MISSING", "input"),
        ({"input": ["a"] * 1025}, "TOO_MANY_SENTENCES", "input"),
        ({"input": "a " * 20000}, "TOO_MANY_TOKENS", None),
        ({"input": "a" * 300_000}, "SENTENCE_TOO_LONG", None),
        ({"input": "a", "model": 1}, "MALFORMED_REQUEST", "model"),
        ({"input": "a", "encoding_format": "hex"}, "MALFORMED_REQUEST", "encoding_format"),
        ({"input": "a", "encoding_format": ["float"]}, "MALFORMED_REQUEST", "encoding_format"),
        ({"input": "a", "dimensions": 3}, "MALFORMED_REQUEST", "dimensions"),
        ({"input": "a", "dimensions": "8"}, "MALFORMED_REQUEST", "dimensions"),
        ({"input": "a", "dimensions": True}, "MALFORMED_REQUEST", "dimensions"),
        ({"input": "a", "user": 7}, "MALFORMED_REQUEST", "user"),
        ({"input": "a", "layers": "all"}, "LAYERS_INVALID", "layers"),
        ({"input": "a", "layers": 1}, "LAYERS_INVALID", "layers"),
        ({"input": "a", "pooling": "none"}, "POOLING_INVALID", "pooling"),
        ({"input": "a", "l2_normalize": 1}, "MALFORMED_REQUEST", "l2_normalize"),
        ({"inputs": "a"}, "MALFORMED_REQUEST", "inputs"),
        ({"input": "a", "No name, but a text.": 1}, "MALFORMED_REQUEST", None),
        (b"", "MALFORMED_REQUEST", None),
        (b"{", "MALFORMED_REQUEST", None),
        (b"[]", "MALFORMED_REQUEST", None),
        (b'{"input":"\\ud800"}', "MALFORMED_REQUEST", None),
        (b'{"input":"\xff"}', "MALFORMED_REQUEST", None),
        (b'{"input":' + b"[" * 100_000, "MALFORMED_REQUEST", None),
        (b'{"input":"a","dimensions":NaN}', "MALFORMED_REQUEST", None),
        (b'{"input":"a","dimensions":1' + b"0" * 300 + b"}", "MALFORMED_REQUEST", "dimensions"),
    ],
)
def test_bad_bodies(address: str, body: object, code: str, field: str | None) -> None:
    answer = embeddings(address, body)
    error = answer.json["error"]
    assert (answer.status, error["code"], error["param"]) == (400, code, field)
    assert error["type"] == "invalid_request_error"
    assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"input":"abc\xff"}', "the body isn't JSON in UTF-8: byte 13 isn't UTF-8"),
        (b'{"input":\n "a",}', "the body isn't JSON in UTF-8: line 2, column 5"),
        ({"inputs": "a"}, "inputs: unknown field (expected dimensions, "),
        ({"input": "a", "No name, but a text.": 1}, "body: unknown field (expected dimensions, "),
        ({"input": []}, "input: found 0 (expected 1 to 1024)"),
    ],
)
def test_messages_name_what_was_found(address: str, body: object, message: str) -> None:
    assert embeddings(address, body).message.startswith(message)


def test_a_text_that_fails_by_itself_is_named(address: str) -> None:
    assert embeddings(address, {"input": ["a", " "]}).message.startswith("sentence 1: ")


def test_integers_are_refused_with_what_helps(address: str) -> None:
    assert "check_embedding_ctx_length=False" in embeddings(address, {"input": [[3, 4]]}).message


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("POST", "/v1/nothing", {}, (404, "METHOD_NOT_FOUND")),
        ("POST", "/", {}, (405, "METHOD_NOT_FOUND")),
        ("GET", "/v1/models/", {}, (404, "METHOD_NOT_FOUND")),
        ("GET", "/v1/models/a/b", {}, (404, "METHOD_NOT_FOUND")),
        ("GET", "/v1/embeddings", {}, (405, "METHOD_NOT_FOUND")),
        ("OPTIONS", "/v1/embeddings", {"origin": "http://evil.example"}, (405, "METHOD_NOT_FOUND")),
        ("DELETE", "/v1/models", {}, (405, "METHOD_NOT_FOUND")),
        ("POST", "/v1/embeddings", {"content-type": "text/plain"}, (415, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {"content-type": "application/json; charset=latin-1"}, (415, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {"host": "evil.example"}, (421, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {"host": "127.0.0.1.evil.example:80"}, (421, "MALFORMED_REQUEST")),
        *[("POST", "/v1/embeddings", {"host": host}, (400, "MALFORMED_REQUEST")) for host in BAD_HOSTS],
        ("POST", "/v1/embeddings", {"timeout": "soon"}, (400, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {"timeout": "-1"}, (400, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {"timeout": "1_0"}, (400, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {"timeout": "1e999"}, (400, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {"expect": "200-ok"}, (417, "MALFORMED_REQUEST")),
        ("POST", "/v1/embeddings", {}, (404, "MODEL_NOT_FOUND")),
    ],
)
def test_refusals(address: str, method: str, path: str, headers: dict[str, str], expected: tuple[int, str]) -> None:
    body = {"input": "a", "model": "another"} if method == "POST" else None
    answer = call(address, method, path, body, headers=headers)
    assert (answer.status, answer.code) == expected
    assert "access-control-allow-origin" not in answer.headers
    allowed = {"/": "GET", "/v1/embeddings": "POST", "/v1/models": "GET"}[path] if answer.status == 405 else None
    assert answer.headers.get("allow") == allowed


def test_other_hosts_of_the_loopback_are_known(address: str) -> None:
    port = address.rpartition(":")[2]
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.2", f"[::1]:{port}", "[::1]"):
        assert call(address, "GET", "/v1/models", headers={"host": host}).status == 200


def test_a_body_that_is_too_large(address: str) -> None:
    answer = embeddings(address, b"x" * (MAX_REQUEST_BYTES + 1))
    assert (answer.status, answer.code) == (413, "MALFORMED_REQUEST")
    with connected(address) as connection:  # in chunks, whose sum nothing has announced
        head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have closed already
            for _ in range(5):
                connection.sendall(chunk)
        assert read_to_end(connection)[:12] in (b"HTTP/1.1 413", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\nx\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 300_000,
    ],
)
def test_what_is_no_request_is_refused_and_closed(address: str, data: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(data)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 4") or not answer
    assert embeddings(address, {"input": "a"}).status == 200


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost/v1/models", "evil.example", 200),  # the target's host counts, not the header's
        ("http://127.0.0.1:80/healthz", "evil.example", 200),
        ("http://localhost/v1/nothing?x", "localhost", 404),
        ("http://evil.example/v1/models", "localhost", 421),
        ("http://me@localhost/v1/models", "localhost", 400),
        ("ftp://localhost/v1/models", "localhost", 404),
    ],
)
def test_a_target_may_be_a_whole_url(address: str, target: str, host: str, status: int) -> None:
    with connected(address) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        assert read_to_end(connection).startswith(b"HTTP/1.1 %d " % status)


# ---- limits and life ----


def test_headers_that_are_too_large(address: str) -> None:
    answer = embeddings(address, {"input": "a"}, headers={"x-long": "a" * 16_384})
    assert answer.status in (400, 431)  # whether or not they came in one piece
    assert embeddings(address, {"input": "a"}, headers={"x-long": "a" * 15_000}).status == 200


def test_a_deadline(server: LoopServer) -> None:
    late = threading.Event()

    def hold(_: object) -> None:
        late.wait(60)

    with server.engine.hooked(join=hold):
        answer = embeddings(server.http.address, {"input": "a"}, headers={"timeout": "0.05"})
        late.set()
    assert (answer.status, answer.code) == (504, "DEADLINE_EXCEEDED")
    server.check_nothing_is_left()


def test_a_client_that_leaves_cancels_its_call(server: LoopServer) -> None:
    reached, left = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        reached.set()
        left.wait(60)

    body = b'{"input":"a b c"}'
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with server.engine.hooked(join=hold):
        with connected(server.http.address) as connection:
            connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert reached.wait(60)
        wait_for_nothing("calls whose client has left", lambda: server.worker.pending)
        left.set()
    server.check_nothing_is_left()


def test_no_connection_leaks(server: LoopServer) -> None:
    for _ in range(20):
        with connected(server.http.address) as connection:
            connection.sendall(b"GET /heal")
        embeddings(server.http.address, {"input": "a"})
    wait_for_nothing("connections", lambda: server.http.n_connections)
