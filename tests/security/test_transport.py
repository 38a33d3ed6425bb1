"""TLS, tokens and limits of single callers, on a real server with the project's client."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_client import AsyncClient, Client, RetryPolicy
from bilm_client.batch.main import main as bilm_embed
from bilm_client.cli.health_check import main as bilm_health
from bilm_client.errors import AuthenticationError, OverloadedError, UnavailableError
from bilm_server.config_sources import load_config
from bilm_server.errors import ConfigurationError
from bilm_server.security.auth import Authenticator, Caller
from bilm_server.served_model import load_served_model
from grpc_health.v1 import health_pb2

from tests.integration.integration_support import PLAIN, health_stub, tokens
from tests.security.tls_support import Authority, Identity, replace
from tests.support.servers import TINY, new_server, serving

TOKEN, OTHER_TOKEN, THIRD_TOKEN = "a-0123456789abcdef", "b-0123456789abcdef", "c-0123456789abcdef"
NEW_TOKEN = "new-0123456789abcdef"
TOKENS = f"team-a {TOKEN}\nteam-b {OTHER_TOKEN}\nteam-c {THIRD_TOKEN}\n".encode()
ONCE = RetryPolicy(max_attempts=1)
SERVING = health_pb2.HealthCheckResponse.SERVING

Flags = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the servers of this module read."""
    return tmp_path_factory.mktemp("transport")


@pytest.fixture(scope="module")
def tls(authority: Authority, folder: Path) -> Iterator[str]:
    """A server with TLS."""
    certificate, key = authority.issue("server").write(folder, "tls")
    with serving_at("--tls-cert", certificate, "--tls-key", key) as target:
        yield target


@pytest.fixture(scope="module")
def mutual(authority: Authority, folder: Path) -> Iterator[str]:
    """A server with mutual TLS."""
    certificate, key = authority.issue("server").write(folder, "mutual")
    flags = ("--tls-client-ca", authority.write(folder))
    with serving_at("--tls-cert", certificate, "--tls-key", key, *flags) as target:
        yield target


@pytest.fixture(scope="module")
def token_file(folder: Path) -> Path:
    return folder / "tokens"


@pytest.fixture(scope="module")
def with_tokens(token_file: Path) -> Iterator[str]:
    """A server that wants tokens, in plaintext."""
    replace(token_file, TOKENS)
    replace(token_file.with_name("callers.toml"), b'[[callers]]\nname = "team-b"\nrights = ["no-log"]\n')
    with serving_at("--token-file", token_file, "--config", token_file.with_name("callers.toml")) as target:
        yield target


@pytest.fixture(scope="module")
def limited(folder: Path) -> Iterator[str]:
    """A server with limits of single callers: one call at a time, 100 tokens/s, 400 of them in the bucket."""
    replace(folder / "limited", TOKENS)
    limits: Flags = ("--caller-max-calls", "1", "--caller-tokens-per-s", "100", "--max-tokens-per-request", "200")
    with serving_at("--token-file", folder / "limited", *limits) as target:
        yield target


@contextmanager
def serving_at(*flags: str | Path) -> Iterator[str]:
    with serving(*map(str, flags)) as server:
        yield server.target


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Caller | None]:
    """Who the calls were from; None for those that were refused."""
    found: list[Caller | None] = []
    identify = Authenticator.identify

    def watched(*arguments: Any) -> Caller:
        found.append(None)
        found[-1] = caller = identify(*arguments)
        return caller

    monkeypatch.setattr(Authenticator, "identify", watched)
    return found


def trusting(authority: Authority, own: Identity | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority.pem, *((own.key_pem, own.certificate_pem) if own else ()))


def embed(target: str, **arguments: Any) -> None:
    with Client(target, **{"timeout_s": 20.0, **arguments}) as client:
        assert client.embed([["a", "sentence"]])[0].vectors.shape[1] == 2


# ---- TLS ----


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def test_every_kind_of_call_over_tls(tls: str, authority: Authority) -> None:
    credentials = trusting(authority)
    embed(tls, credentials=credentials)
    with Client(tls, credentials=credentials) as client:
        assert client.health().name == "SERVING"
        assert client.model_info().layer_count == 3
        assert len(list(client.embed_stream([["a"], ["b"]]))) == 2

    async def calls() -> None:
        async with AsyncClient(tls, credentials=credentials) as client:
            await client.embed([["a"]])
            assert len([result async for result in client.embed_stream([["a"], ["b"]])]) == 2

    asyncio.run(calls())


def test_who_is_turned_away_by_tls(tls: str, seen: list[Caller | None]) -> None:
    for credentials in (None, trusting(Authority())):  # in plaintext; for another authority's server
        with pytest.raises(UnavailableError):
            embed(tls, credentials=credentials, retry=ONCE)
    assert seen == []


def test_tls_where_the_server_has_none(with_tokens: str, authority: Authority) -> None:
    with pytest.raises(UnavailableError):
        embed(with_tokens, credentials=trusting(authority), token=TOKEN, retry=ONCE)


def test_a_rotation_under_a_client(tls: str, authority: Authority, folder: Path) -> None:
    with Client(tls, credentials=trusting(authority)) as old:
        old.embed([["before"]])
        successor = Authority()
        successor.issue("server").write(folder, "tls")
        try:
            embed(tls, credentials=trusting(successor))
            old.embed([["after"]])
        finally:
            authority.issue("server").write(folder, "tls")
    embed(tls, credentials=trusting(authority))


def test_mutual_tls_names_the_caller(mutual: str, authority: Authority, seen: list[Caller | None]) -> None:
    embed(mutual, credentials=trusting(authority, authority.issue("team-a")))
    assert set(seen) == {Caller("team-a")}
    seen.clear()
    embed(mutual, credentials=trusting(authority, authority.issue("")))
    assert set(seen) == {Caller("localhost")}  # its first alternative name
    seen.clear()
    for own in (None, authority.issue("team-a", expired=True), Authority().issue("team-a")):
        with pytest.raises(UnavailableError):
            embed(mutual, credentials=trusting(authority, own), retry=ONCE)
    assert seen == []


async def test_files_that_cannot_be_served_with_stop_the_start(authority: Authority, tmp_path: Path) -> None:
    certificate, _ = authority.issue("server").write(tmp_path, "server")
    _, key = authority.issue("other").write(tmp_path, "other")
    (short := tmp_path / "short").write_text("team-a too-short\n")
    for flags, message in (
        (("--tls-cert", certificate, "--tls-key", key), f"{certificate}, {key}: not a certificate chain and the key"),
        (("--token-file", short), f"{short}: line 1: the token has fewer than 16 characters"),
    ):
        config = load_config(["--model", TINY, "--listen", "127.0.0.1:0", *map(str, flags)])
        server = new_server(config, load_served_model(config))
        with pytest.raises(ConfigurationError, match=message):
            await server.start()
        await server.stop()


# ---- tokens ----


def test_a_token_is_needed_and_asked_for_once(with_tokens: str, seen: list[Caller | None]) -> None:
    embed(with_tokens, token=TOKEN)
    assert set(seen) == {Caller("team-a")}
    for token in (None, TOKEN[:-1], NEW_TOKEN):
        with Client(with_tokens, token=token) as client:
            for call in (
                lambda client=client: client.embed([["a"]]),
                lambda client=client: client.model_info(),
                lambda client=client: list(client.embed_stream([["a"]])),
            ):
                seen.clear()
                with pytest.raises(AuthenticationError) as error:
                    call()
                assert (error.value.code, error.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
                assert seen == [None]  # never tried again


async def test_the_asynchronous_client_hears_it_too(with_tokens: str) -> None:
    async with AsyncClient(with_tokens) as client:
        with pytest.raises(AuthenticationError):
            await client.embed([["a"]])
        with pytest.raises(AuthenticationError):
            async for _ in client.embed_stream([["a"]]):
                pass


def test_tokens_rotate_without_a_gap(with_tokens: str, token_file: Path) -> None:
    with Client(with_tokens, token=TOKEN) as old, Client(with_tokens, token=NEW_TOKEN) as new:
        try:
            old.embed([["a"]])
            replace(token_file, f"team-a {TOKEN}\nteam-a {NEW_TOKEN}\n".encode())
            old.embed([["a"]])
            new.embed([["a"]])
            replace(token_file, f"team-a {NEW_TOKEN}\n".encode())
            new.embed([["a"]])
            with pytest.raises(AuthenticationError):
                old.embed([["a"]])
        finally:
            replace(token_file, TOKENS)
        old.embed([["a"]])


def test_health_needs_no_token(with_tokens: str) -> None:
    with grpc.insecure_channel(with_tokens) as channel:
        for name in ("", "bilm_api.v1.EmbedService"):
            request = health_pb2.HealthCheckRequest(service=name)
            assert health_stub(channel).Check(request, timeout=60).status == SERVING
            watch = health_stub(channel).Watch(request, timeout=60)
            assert next(watch).status == SERVING
            watch.cancel()
    assert bilm_health(["--target", with_tokens, "--timeout-s", "10"]) == 0


def test_nothing_but_health_answers_without_a_token(with_tokens: str, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(with_tokens) as channel:
        for path in ("/grpc.health.v1.Health2/Check", "/bilm_api.v1.EmbedService/canary", "/canary"):
            for metadata, code in (((), "UNAUTHENTICATED"), (bearer(TOKEN), "UNIMPLEMENTED")):
                method: Any = channel.unary_unary(path)
                with pytest.raises(grpc.RpcError) as error:
                    method(b"", metadata=metadata, timeout=10)
                assert error.value.code().name == code
        if hasattr(health_pb2, "HealthListResponse"):
            listed: Any = channel.unary_unary("/grpc.health.v1.Health/List")
            assert listed(b"", timeout=10)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "canary" not in caplog.text


def test_nothing_of_a_request_is_parsed_before_its_token_is_known(with_tokens: str) -> None:
    with grpc.insecure_channel(with_tokens) as channel:
        method: Any = channel.unary_unary("/bilm_api.v1.EmbedService/Embed")
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            (bearer(TOKEN), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as error:
                method(b"\xff", metadata=metadata, timeout=60)
            assert error.value.code() is code


def test_no_token_is_logged(with_tokens: str, token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    try:
        embed(with_tokens, token=TOKEN)
        with pytest.raises(AuthenticationError):
            embed(with_tokens, token=NEW_TOKEN)
        replace(token_file, f"team-a {NEW_TOKEN}\nteam-a {NEW_TOKEN}\n".encode())
        embed(with_tokens, token=TOKEN)
    finally:
        replace(token_file, TOKENS)
    assert "the token of another line" in caplog.text
    assert TOKEN not in caplog.text
    assert NEW_TOKEN not in caplog.text


def test_only_callers_that_may_leave_no_access_log(with_tokens: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mark = ("x-bilm-no-log", "1")
    with grpc.insecure_channel(with_tokens) as channel:
        method: Any = channel.unary_unary("/bilm_api.v1.EmbedService/GetModel")
        for metadata in (bearer(TOKEN), bearer(OTHER_TOKEN), bearer(NEW_TOKEN), ()):
            for marked in ((), (mark,)):
                with contextlib.suppress(grpc.RpcError):
                    method(b"", metadata=(*metadata, *marked), timeout=10)
    access_log = "bilm_server.observability.access_log"
    ended = (access_log, "bilm_server.test")
    deadline_s = time.monotonic() + 20
    while sum(record.name in ended for record in caplog.records) < 8 and time.monotonic() < deadline_s:
        time.sleep(0.005)  # a call's line follows its status
    lines = [vars(record)["fields"] for record in caplog.records if record.name == access_log]
    assert [(line.get("caller"), line["code"]) for line in lines] == [
        *(("team-a", "OK"),) * 2, ("team-b", "OK"), *((None, "UNAUTHENTICATED"),) * 4
    ]  # fmt: skip
    used = [record.getMessage() for record in caplog.records if record.name == "bilm_server.observability.no_log_calls"]
    assert used == ["caller team-b: 1 calls kept out of the access log by x-bilm-no-log"]


# ---- limits ----


def test_calls_at_a_time_of_each_caller(limited: str) -> None:
    released = threading.Event()

    def requests() -> Iterator[embed_pb2.EmbedStreamRequest]:
        yield embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=PLAIN))
        yield embed_pb2.EmbedStreamRequest(item=embed_pb2.StreamItem(id=1, sentence=tokens("a")))
        released.wait(60)

    with grpc.insecure_channel(limited) as channel:
        stub: Any = embed_pb2_grpc.EmbedServiceStub(channel)
        stream = stub.EmbedStream(requests(), metadata=bearer(TOKEN), timeout=60)
        try:
            assert next(stream).id == 1
            with pytest.raises(OverloadedError) as error:
                embed(limited, token=TOKEN, retry=ONCE)
            assert error.value.reason == "CALLER_LIMIT"
            assert error.value.retry_after_ms >= 20
            embed(limited, token=OTHER_TOKEN, retry=ONCE)
        finally:
            released.set()
        assert list(stream) == []
    embed(limited, token=TOKEN, retry=ONCE)


def test_tokens_a_second_of_each_caller(limited: str) -> None:
    request = [["word"] * 200]
    with Client(limited, token=TOKEN, retry=ONCE) as client:
        with pytest.raises(OverloadedError) as error:
            list(map(client.embed, [request] * 20))  # the bucket has room for two; a slow machine lets more in
        assert error.value.reason == "CALLER_LIMIT"
        assert 20 <= error.value.retry_after_ms <= 2001
    embed(limited, token=OTHER_TOKEN, retry=ONCE)
    with Client(limited, token=TOKEN) as patient:
        patient.embed(request)  # its retry waits for as long as it was told


def test_calls_one_after_another_are_never_two(limited: str) -> None:
    """A call's place is given back when its answer has been sent, which must be before the caller's next one."""
    with Client(limited, token=OTHER_TOKEN, retry=ONCE) as client:
        for _ in range(500):
            client.model_info()


def test_a_stream_is_slowed_down_and_not_refused(limited: str) -> None:
    begun_s = time.monotonic()
    with Client(limited, token=THIRD_TOKEN, retry=ONCE) as client:
        assert len(list(client.embed_stream([["word"] * 10] * 30))) == 30
        assert time.monotonic() - begun_s > 0.85  # 300 tokens, of which 210 were to be had at once
        client.embed([["word"] * 150])  # the stream has left so much


# ---- commands ----


def test_bilm_health_over_mutual_tls(mutual: str, authority: Authority, folder: Path, tmp_path: Path) -> None:
    certificate, key = authority.issue("probe").write(tmp_path, "probe")
    trust = ("--target", mutual, "--timeout-s", "10", "--ca-file", str(folder / "ca.pem"))
    assert bilm_health([*trust, "--cert-file", str(certificate), "--key-file", str(key)]) == 0
    assert bilm_health(trust) == 2


@pytest.mark.parametrize("how", [(), ("--carry-state",)])
def test_bilm_embed_over_mutual_tls(
    how: tuple[str, ...], mutual: str, authority: Authority, folder: Path, tmp_path: Path
) -> None:
    certificate, key = authority.issue("batch").write(tmp_path, "batch")
    flags = ("--ca-file", folder / "ca.pem", "--cert-file", certificate, "--key-file", key)
    assert embed_lines(tmp_path, mutual, *flags, *how) == 0


def test_bilm_embed_with_a_token(with_tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (token := tmp_path / "token").write_text(f"{TOKEN}\n")
    assert embed_lines(tmp_path, with_tokens) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err
    assert embed_lines(tmp_path, with_tokens, "--token-file", token) == 0


def embed_lines(folder: Path, target: str, *flags: str | Path) -> int:
    (text := folder / "text.txt").write_text("one line\nanother one\n")
    return bilm_embed([str(text), str(folder / "out.npz"), "--target", target, *map(str, flags)])
