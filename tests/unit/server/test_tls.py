"""Credentials that follow their files, by handshakes with a server of grpc.aio."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_server.errors import ConfigurationError
from bilm_server.security.tls import server_credentials
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.security.tls_support import Authority, Identity, PrivateKey, replace

NAME_OF_CLIENT = "x509_common_name"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


class Port:
    """A port with credentials; its one method answers with the name in the caller's certificate."""

    def __init__(self, stack: AsyncExitStack, port: int, authority: Authority) -> None:
        self._stack, self._port, self._authority = stack, port, authority

    async def connect(self, own: Identity | None = None, trusted: Authority | None = None) -> Callable[[], Any]:
        """A caller with a connection of its own, which opens with its first call."""
        pair = (own.key_pem, own.certificate_pem) if own else ()
        credentials = grpc.ssl_channel_credentials((trusted or self._authority).pem, *pair)
        channel = grpc.aio.secure_channel(
            f"localhost:{self._port}", credentials, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        await self._stack.enter_async_context(channel)
        method: Any = channel.unary_unary("/test/Who")
        return lambda: method(b"", timeout=60)


@asynccontextmanager
async def listening(credentials: grpc.ServerCredentials, authority: Authority) -> AsyncIterator[Port]:
    async def who(_request: bytes, context: Any) -> bytes:
        return b"".join(context.auth_context().get(NAME_OF_CLIENT, ()))

    server = grpc.aio.server()
    handlers: Any = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", handlers)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        async with AsyncExitStack() as stack:
            yield Port(stack, port, authority)
    finally:
        await server.stop(None)


async def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call()
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
    ],
)
async def test_usable_keys(key: PrivateKey, authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("server", key=key).write(tmp_path, "server")
    async with listening(server_credentials(*files), authority) as port:
        assert await (await port.connect())() == b""


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())])
def test_keys_with_which_grpc_fails_every_handshake(key: PrivateKey, authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"server\.pem: the certificate's key must be RSA, or ECDSA on P-256"):
        server_credentials(*authority.issue("server", key=key).write(tmp_path, "server"))


async def test_a_rotation_holds_for_new_connections_and_cuts_no_old_one(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("server").write(tmp_path, "server")
    async with listening(server_credentials(*files), authority) as port:
        old = await port.connect()
        await old()
        successor = Authority()
        successor.issue("server").write(tmp_path, "server")
        await (await port.connect(trusted=successor))()
        await refused(await port.connect())  # it trusts the old authority only
        await old()


async def test_a_pair_that_is_replaced_one_by_one_stays_in_use_until_it_is_whole(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.issue("server").write(tmp_path, "server")
    async with listening(server_credentials(*files), authority) as port:
        successor = Authority()
        new = successor.issue("server")
        replace(files[0], new.certificate_pem)
        for _ in range(3):
            await (await port.connect())()
        assert len(errors(caplog)) == 1  # once a change, not once a connection
        assert "what was loaded before stays in use" in errors(caplog)[0]
        replace(files[1], new.key_pem[:100])
        await (await port.connect())()
        assert len(errors(caplog)) == 2
        replace(files[1], new.key_pem)
        await (await port.connect(trusted=successor))()
        assert len(errors(caplog)) == 2


async def test_a_missing_file_is_looked_for_again(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.issue("server").write(tmp_path, "server")
    async with listening(server_credentials(*files), authority) as port:
        files[0].unlink()
        await (await port.connect())()
        await (await port.connect())()
        assert len(errors(caplog)) == 1
        successor = Authority()
        successor.issue("server").write(tmp_path, "server")
        await (await port.connect(trusted=successor))()


async def test_callers_need_a_certificate_of_the_authority_that_is_valid_now(
    authority: Authority, tmp_path: Path
) -> None:
    files = authority.issue("server").write(tmp_path, "server")
    credentials = server_credentials(*files, authority.write(tmp_path))
    async with listening(credentials, authority) as port:
        assert await (await port.connect(authority.issue("a team")))() == b"a team"
        await refused(await port.connect())
        await refused(await port.connect(authority.issue("a team", expired=True)))
        await refused(await port.connect(Authority().issue("a team")))


async def test_the_authority_of_the_callers_rotates_too(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("server").write(tmp_path, "server")
    async with listening(server_credentials(*files, authority.write(tmp_path)), authority) as port:
        old, late = await port.connect(authority.issue("old")), await port.connect(authority.issue("late"))
        await old()
        successor = Authority()
        successor.write(tmp_path)
        assert await (await port.connect(successor.issue("new")))() == b"new"
        await refused(late)
        assert await old() == b"old"


def test_bad_files_at_the_start(authority: Authority, tmp_path: Path) -> None:
    server = authority.issue("server")
    certificate, key = server.write(tmp_path, "server")
    _, other_key = authority.issue("other").write(tmp_path, "other")
    garbage, locked = tmp_path / "garbage", tmp_path / "locked"
    garbage.write_bytes(b"\xffgarbage")
    locked.write_bytes(server.locked_key_pem)
    nowhere = tmp_path / "nowhere"
    for files, message in (
        ((nowhere, key), f"{nowhere}: No such file or directory"),
        ((certificate, nowhere), f"{nowhere}: No such file or directory"),
        ((certificate, key, nowhere), f"{nowhere}: No such file or directory"),
        ((tmp_path, key), f"{tmp_path}: Is a directory"),
        ((garbage, key), f"{garbage}, {key}: not a certificate chain and the key that belongs to it"),
        ((certificate, other_key), f"{certificate}, {other_key}: not a certificate chain and the key that belongs"),
        ((certificate, locked), f"{certificate}, {locked}: not a certificate chain .* without a password"),
        ((certificate, key, garbage), f"{garbage}: no certificates as PEM"),
        ((certificate, key, key), f"{key}: no certificates as PEM"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            server_credentials(*files)


def test_a_key_that_everybody_can_read_is_told(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.issue("server").write(tmp_path, "server")
    server_credentials(*files)
    assert not caplog.records
    files[1].chmod(0o644)
    server_credentials(*files)
    assert [record.getMessage() for record in caplog.records] == [
        f"{files[1]} can be read or written by every user of this machine (mode 644)"
    ]
