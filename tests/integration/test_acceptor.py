"""One bad frame ends grpc.aio's accept loop; the server must outlive it."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import hpack
import pytest
from bilm_api.v1 import embed_pb2
from bilm_server.errors import BindError
from bilm_server.protocols.grpc.acceptor import Acceptor
from bilm_server.protocols.grpc.listening import TcpAddress
from grpc_health.v1 import health_pb2

from tests.integration.integration_support import PLAIN, health_stub, tokens
from tests.support.hooked_engine import Hooks
from tests.support.processes import descriptors, wait_until
from tests.support.servers import LoopServer, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
REQUEST = embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens("a")])


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@contextmanager
def call_with_a_bad_path(target: str) -> Iterator[socket.socket]:
    """A call whose :path is not UTF-8, on a connection of its own."""
    headers = hpack.Encoder().encode(
        [(":method", "POST"), (":scheme", "http"), (b":path", b"/canary\xff"), (":authority", "a"),
         ("content-type", "application/grpc"), ("te", "trailers")],
        huffman=False,
    )  # fmt: skip
    with connected(target) as connection:
        call = frame(1, 4, 1, headers) + frame(0, 1, 1, bytes(5))
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + call)
        yield connection


def connected(target: str) -> socket.socket:
    if target.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(target.removeprefix("unix:"))
        return connection
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def test_the_server_outlives_a_bad_path(start: Callable[..., LoopServer], caplog: pytest.LogCaptureFixture) -> None:
    server = start("--health-listen", "127.0.0.1:0")
    known = server.stub().Embed(REQUEST).results[0].embedding.tensor.data
    entered, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert go_on.wait(60)

    server.engine.hooks = Hooks(advance=wait)
    in_flight = server.stub().Embed.future(REQUEST)
    assert entered.wait(60)
    target = server.target
    with call_with_a_bad_path(target):
        wait_until(
            lambda: any(record.name == "bilm_server.protocols.grpc.acceptor" for record in caplog.records),
            "it listens anew",
        )
    go_on.set()
    assert in_flight.result(60).results[0].embedding.tensor.data == known
    again = server.stub().Embed(REQUEST, timeout=20, wait_for_ready=True)
    assert again.results[0].embedding.tensor.data == known
    assert server.target == target
    told = [record for record in caplog.records if record.name.startswith("bilm_server.") and "grpc" in record.message]
    assert [(record.name, record.levelno) for record in told] == [
        ("bilm_server.protocols.grpc.acceptor", logging.WARNING)
    ]
    assert "canary" not in caplog.text


def test_as_often_as_anybody_likes(start: Callable[..., LoopServer]) -> None:
    server = start("--grace-s", "0")
    before = 0
    for number in range(12):
        with call_with_a_bad_path(server.target) as connection:
            while connection.recv(4096):  # closed with the port
                pass
        with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            grpc.channel_ready_future(channel).result(60)
        if number == 3:
            before = descriptors(os.getpid())
    wait_until(lambda: descriptors(os.getpid()) <= before, "all connections are closed")


@pytest.fixture(params=["--listen", "--health-listen"])
def unix(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A flag that makes a server listen on a Unix socket, and the socket's target."""
    return request.param, f"unix:{tmp_path}/bilm.sock"


def is_healthy(target: str) -> bool:
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = health_pb2.HealthCheckRequest()
        return bool(health_stub(channel).Check(request, timeout=20, wait_for_ready=True).status == SERVING)


def test_a_unix_socket_outlives_bad_paths_and_goes_with_its_server(tmp_path: Path, unix: tuple[str, str]) -> None:
    flag, target = unix
    with serving("--grace-s", "0", flag, target):
        for _ in range(4):
            with call_with_a_bad_path(target) as connection:
                while connection.recv(4096):  # closed with its server
                    pass
            assert is_healthy(target)
        assert (tmp_path / "bilm.sock").is_socket()
    assert list(tmp_path.iterdir()) == []


def test_a_second_server_on_a_unix_socket_is_refused_and_takes_nothing_away(unix: tuple[str, str]) -> None:
    flag, target = unix
    with serving(flag, target):
        with pytest.raises(BindError, match=f"listen: can't listen on {target}.*another server"):  # noqa: SIM117
            with serving(flag, target):
                pass
        assert is_healthy(target)
    with serving(flag, target):  # its end has left the path free
        assert is_healthy(target)


class StoppingAddress(TcpAddress):
    """Has its acceptor stopped as soon as a second server is bound, before that one has started."""

    def __init__(self) -> None:
        super().__init__("listen", "127.0.0.1:0")
        self.n_bound = 0
        self.acceptor: Acceptor | None = None
        self.stopped = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    def bind(self, server: grpc.aio.Server) -> str:
        self.n_bound += 1
        if self.n_bound == 2:
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        return super().bind(server)

    async def _stop(self) -> None:
        assert self.acceptor is not None
        await self.acceptor.stop(0)
        self.stopped.set()


async def test_a_stop_while_another_server_takes_the_place_of_one_leaves_nothing_listening() -> None:
    address = StoppingAddress()
    acceptor = address.acceptor = Acceptor(grpc.aio.server, lambda _: None, address, 0, starting=asyncio.Lock())
    await acceptor.start()
    with call_with_a_bad_path(acceptor.target):
        await asyncio.wait_for(address.stopped.wait(), 20)
    with pytest.raises(ConnectionRefusedError):
        connected(acceptor.target)


async def test_one_acceptor_does_not_watch_the_loop_of_another() -> None:
    """Both start at once, so that the loops of both are new to each."""
    starting = asyncio.Lock()
    acceptors = [
        Acceptor(grpc.aio.server, lambda _: None, TcpAddress("listen", "127.0.0.1:0"), 0, starting=starting)
        for _ in range(2)
    ]
    await asyncio.gather(*(acceptor.start() for acceptor in acceptors))
    first, second = (acceptor.target for acceptor in acceptors)
    untouched = connected(second)
    with call_with_a_bad_path(first) as connection:
        while await asyncio.to_thread(connection.recv, 4096):
            pass
    untouched.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
    assert await asyncio.to_thread(untouched.recv, 9)
    untouched.close()
    await asyncio.gather(*(acceptor.stop(0) for acceptor in acceptors))
