"""One client and several servers: the shares of the calls, while servers are slow, drain and stop."""

import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from bilm_client import AsyncClient, Client, Keepalive, RetryPolicy
from bilm_client.errors import UnavailableError
from bilm_client.policy import Balance

from tests.integration.batch_support import embed, write
from tests.security.tls_support import Authority
from tests.support.hooked_engine import Hooks
from tests.support.server_processes import ProcessServer
from tests.support.servers import LoopServer

TOKEN = "a-0123456789abcdef"
SENTENCE = ["some", "words", "in", "a", "row"]
CALLERS = 8
SLOW_S, FAST_S = 0.04, 0.01
WINDOWS = 60


class Counted:
    """Count the sentences of a server in this process, and let each of its rounds take `round_s` more."""

    def __init__(self, server: LoopServer, round_s: float = 0.0) -> None:
        self.server, self.target, self.sentences = server, server.target, 0
        self._round_s, self._never = round_s, threading.Event()
        server.engine.hooks = Hooks(join=self._joined, advance=self._advance)

    def _advance(self) -> None:
        self._never.wait(self._round_s)

    def _joined(self, sentences: Sequence[object]) -> None:
        self.sentences += len(sentences)


class Callers:
    """Embed through one client in several threads; the first call that fails fails the test."""

    def __init__(self, client: Client, counted: Sequence[Counted]) -> None:
        self._client, self._counted = client, counted
        self._pool = ThreadPoolExecutor(CALLERS)

    def shares(self, n_calls: int) -> list[int]:
        """Return how many of so many calls each counted server got, and behind them those of all other servers."""
        before = [server.sentences for server in self._counted]
        list(self._pool.map(lambda _: self._client.embed([SENTENCE]), range(n_calls)))
        found = [server.sentences - count for server, count in zip(self._counted, before, strict=True)]
        return [*found, n_calls - sum(found)]

    def until(self, condition: Callable[[list[int]], bool], n_calls: int = 120) -> list[int]:
        """Return the first shares that fulfil a condition."""
        for _ in range(WINDOWS):
            if condition(found := self.shares(n_calls)):
                return found
        raise AssertionError(found)

    def close(self) -> None:
        self._pool.shutdown()


@contextmanager
def names(*addresses: str) -> Iterator[str]:
    """Run a name server for which every name has these IPv4 addresses; yield its own address."""
    records = b"".join(struct.pack(">HHHIH4s", 0xC00C, 1, 1, 1, 4, socket.inet_aton(each)) for each in addresses)

    def answer() -> None:
        while True:
            data, peer = listener.recvfrom(512)
            if not data:  # the end of the test
                return
            end = data.index(b"\0", 12) + 5  # of the question: the name, its type, its class
            found = records if data[end - 4 : end - 2] == b"\0\1" else b""
            header = struct.pack(">HHHHH", 0x8580, 1, len(addresses) if found else 0, 0, 0)
            listener.sendto(data[:2] + header + data[12:end] + found, peer)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        host, port = listener.getsockname()
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"{host}:{port}"
        finally:
            listener.sendto(b"", (host, port))
            thread.join()


def test_shares_follow_capacity_through_a_drain_and_a_stopped_process(start: Callable[..., LoopServer]) -> None:
    """Three servers of unlike speed, of which one drains and one is stopped: no call fails, and nothing else balances.

    A stopped process keeps its connections, so only the client's keepalive shows it.
    """
    flags = ("--load-reports", "--drain-delay-s", "1")
    slow, fast = Counted(start(*flags, busy=True), SLOW_S), Counted(start(*flags, busy=True), FAST_S)
    with ExitStack() as stack:
        process = stack.enter_context(ProcessServer("--load-reports"))
        targets = [slow.target, fast.target, process.target]
        client = stack.enter_context(
            Client(targets, balance="weighted", keepalive=Keepalive(time_s=1, timeout_s=1), timeout_s=60)
        )
        callers = Callers(client, [slow, fast])
        stack.callback(callers.close)

        slow_calls, fast_calls, other_calls = callers.until(
            lambda shares: shares[0] > 0 and 2.5 < shares[1] / shares[0] < 6 and shares[2] > shares[1]
        )
        assert slow_calls + fast_calls + other_calls == 120

        draining = threading.Thread(target=lambda: fast.server.call(fast.server.server.drain))
        draining.start()
        slow_calls, fast_calls, other_calls = callers.until(lambda shares: shares[1] == 0)
        assert other_calls > slow_calls > 0
        draining.join()
        assert callers.shares(60)[1] == 0

        process.send_signal(signal.SIGSTOP)
        assert callers.until(lambda shares: shares[2] == 0, 40)[:2] == [40, 0]


@pytest.mark.parametrize("balance", ["round_robin", "weighted"])
async def test_without_load_reports_servers_take_turns(start: Callable[..., LoopServer], balance: Balance) -> None:
    first, second = Counted(start()), Counted(start())
    async with AsyncClient(f"{first.target},{second.target}", balance=balance) as client:
        while not (first.sentences and second.sentences):  # until both are connected
            await client.embed([SENTENCE])
        before = first.sentences
        for _ in range(40):
            await client.embed([SENTENCE])
    assert 18 <= first.sentences - before <= 22


def test_the_first_server_takes_all_calls(start: Callable[..., LoopServer]) -> None:
    counted = [Counted(start()), Counted(start())]
    with Client([server.target for server in counted]) as client:
        for _ in range(10):
            client.embed([SENTENCE])
    assert sorted(server.sentences for server in counted) == [0, 10]


def test_a_name_may_have_several_addresses(start: Callable[..., LoopServer]) -> None:
    first = Counted(start())
    port = first.target.rpartition(":")[2]
    second = Counted(start("--listen", f"127.0.0.2:{port}"))
    with names("127.0.0.1", "127.0.0.2") as name_server:
        target = f"dns://{name_server}/bilm-serve.test:{port}"
        with Client(target, balance="round_robin", proxy=False) as client:
            while not (first.sentences and second.sentences):
                client.embed([SENTENCE])


def test_servers_of_a_list_are_verified_by_their_common_name(start: Callable[..., LoopServer], tmp_path: Path) -> None:
    """Health checks have the client's certificate, and need no token."""
    authority = Authority()
    ca, certificate, key = authority.write(tmp_path), *authority.issue("server").write(tmp_path, "server")
    (tokens := tmp_path / "tokens").write_text(f"team-a {TOKEN}\n", encoding="utf-8")
    tls = {"--tls-cert": certificate, "--tls-key": key, "--tls-client-ca": ca, "--token-file": tokens}
    flags = [str(part) for flag in tls.items() for part in flag]
    counted = [Counted(start(*flags)), Counted(start(*flags))]
    own = authority.issue("team-a")

    def embed_as(name: str) -> None:
        with Client(
            [server.target for server in counted],
            balance="round_robin",
            credentials=grpc.ssl_channel_credentials(authority.pem, own.key_pem, own.certificate_pem),
            token=TOKEN,
            channel_options=[("grpc.default_authority", name)],
            retry=RetryPolicy(max_attempts=1),
        ) as client:
            for _ in range(8):
                client.embed([SENTENCE])

    embed_as("localhost")
    assert sum(server.sentences for server in counted) == 8
    with pytest.raises(UnavailableError):
        embed_as("elsewhere.test")


def test_a_file_is_embedded_by_all_servers(start: Callable[..., LoopServer], tmp_path: Path) -> None:
    counted = [Counted(start("--load-reports"), FAST_S), Counted(start("--load-reports"), FAST_S)]
    text = write(tmp_path / "text", *(["a few words"] * 200))
    target = ",".join(server.target for server in counted)
    output = tmp_path / "out.hdf5"
    assert embed(target, text, output, "--balance", "weighted", "--batch-tokens", "6") == 0
    assert all(server.sentences >= 20 for server in counted)
    assert sum(server.sentences for server in counted) == 200
