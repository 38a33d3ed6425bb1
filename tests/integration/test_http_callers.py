"""Callers of the HTTP door on a real server: tokens, TLS, limits, hosts, and how their calls end with the server."""

import http.client
import ssl
import threading
from pathlib import Path

import pytest

from tests.security.tls_support import Authority, replace
from tests.support.http_calls import Answer, call, call_on, connected, embeddings, read_to_end
from tests.support.servers import LoopServer, serving

TEXTS = ["The bank by the river was steep .", "a", "Ünïcödé wörds", "She works at a bank ."]
HTTP = ("--http-listen", "127.0.0.1:0")
TOKEN, NEW_TOKEN = "a-token-of-sixteen", "another-token-of-sixteen"
BAD_TOKENS = ("Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN} and more", "\xff")
ONE = {"input": "a"}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    replace(path, f"team-a {TOKEN}\n".encode())
    return path


def test_tokens_limits_and_hosts(token_file: Path) -> None:
    flags = ("--token-file", str(token_file), "--caller-max-calls", "1", "--http-host", "bilm.example")
    known = {"authorization": f"Bearer {TOKEN}", "host": "bilm.example:80"}
    with serving(*HTTP, *flags, "--http-host", "b") as server:
        address = server.http.address
        refused = [
            *(embeddings(address, ONE, headers={"authorization": value}) for value in BAD_TOKENS),
            embeddings(address, ONE),
            *(call(address, "GET", path) for path in ("/v1/models", "/nothing", "/metrics", "/openapi.json")),
        ]
        assert {(answer.status, answer.code, answer.headers["www-authenticate"]) for answer in refused} == {
            (401, "UNAUTHENTICATED", "Bearer")
        }
        assert not [answer for answer in refused if TOKEN in answer.body.decode()]
        assert call(address, "GET", "/healthz").status == call(address, "GET", "/readyz").status == 200
        assert [call(address, "GET", "/", headers={"host": name}).status for name in ("b", "localhost")] == [200, 421]
        assert embeddings(address, ONE, headers=known).status == 200
        assert embeddings(address, ONE, headers={**known, "authorization": f"bEARER {TOKEN}"}).status == 200
        assert embeddings(address, ONE, headers={**known, "host": "localhost"}).status == 421
        _check_second_call_of_a_caller(server, known)


def test_tokens_over_tls_follow_their_files(token_file: Path, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.issue("server").write(tmp_path, "server")
    flags = ("--token-file", str(token_file), "--tls-cert", str(certificate), "--tls-key", str(key))
    trusting = ssl.create_default_context(cafile=str(authority.write(tmp_path)))
    with serving(*HTTP, *flags) as server:

        def ask(token: str) -> int:
            headers = {"authorization": f"Bearer {token}"}
            return embeddings(server.http.address, ONE, headers=headers, tls=trusting).status

        assert (ask(TOKEN), ask(NEW_TOKEN)) == (200, 401)
        replace(token_file, f"team-a {NEW_TOKEN}\n".encode())
        authority.issue("renewed").write(tmp_path, "server")
        assert (ask(TOKEN), ask(NEW_TOKEN)) == (401, 200)
        with connected(server.http.address) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"HTTP" not in read_to_end(plain)


def test_a_callers_tokens_a_second() -> None:
    """Twice the largest request at once, then by the rate."""
    with serving(*HTTP, "--caller-tokens-per-s", "1", "--max-tokens-per-request", "100") as server:
        answers = [embeddings(server.http.address, {"input": "a " * 90}) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert answers[-1].code == "CALLER_LIMIT"
        assert int(answers[-1].headers["retry-after-ms"]) > 0


def _check_second_call_of_a_caller(server: LoopServer, headers: dict[str, str]) -> None:
    address = server.http.address
    reached, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        reached.set()
        go_on.wait(60)

    first: list[Answer] = []
    with server.engine.hooked(join=hold):
        thread = threading.Thread(target=lambda: first.append(embeddings(address, ONE, headers=headers)))
        thread.start()
        try:
            assert reached.wait(60)
            second = embeddings(address, ONE, headers=headers)
        finally:
            go_on.set()
            thread.join()
    assert (second.status, second.code) == (429, "CALLER_LIMIT")
    assert int(second.headers["retry-after-ms"]) >= 20
    assert int(second.headers["retry-after"]) >= 1
    assert first[0].status == 200


def test_a_drain_lets_a_call_finish_and_closes_idle_connections() -> None:
    with serving(*HTTP, busy=True) as server:
        address = server.http.address
        host, _, port = address.rpartition(":")
        idle = http.client.HTTPConnection(host, int(port), timeout=60)
        assert call_on(idle, "GET", "/healthz").status == 200
        reached, go_on = threading.Event(), threading.Event()

        def hold(_: object) -> None:
            reached.set()
            go_on.wait(60)

        found: list[Answer] = []
        with server.engine.hooked(join=hold):
            thread = threading.Thread(target=lambda: found.append(embeddings(address, {"input": TEXTS})))
            thread.start()
            assert reached.wait(60)
            draining = threading.Thread(target=lambda: server.call(server.server.drain))
            draining.start()
            assert idle.sock.recv(1) == b""  # closed by the server
            go_on.set()
            draining.join()
            thread.join()
        assert found[0].status == 200
        assert server.http.n_connections == 0
        with pytest.raises(ConnectionRefusedError):
            connected(address)
        idle.close()
