"""This machine's addresses are reached without a proxy, whatever the environment says."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from bilm_bench.resources import Resources, of_page
from bilm_client import AsyncClient, Client, RetryPolicy, ServiceError
from bilm_client.cli import health_check
from bilm_system.proxies import WITHOUT_PROXY, channel_options, is_local_target, is_local_url, lists_addresses
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.scripted import Scripted

LOCAL = [
    "localhost:1",
    "LOCALHOST:1",
    "localhost.:1",
    "a.localhost:1",
    "localhost",
    "127.0.0.1:1",
    "127.255.255.254:1",
    "127.1:1",
    "0.0.0.0:1",
    "[::1]:1",
    "::1",
    "[::ffff:127.0.0.1]:1",
    "dns:localhost:1",
    "dns:///localhost:1",
    "dns:///[::1]:1",
    "dns://8.8.8.8/localhost:1",
    "ipv4:127.0.0.1:1",
    "ipv4:127.0.0.1:1,127.0.0.1:2",
    "ipv4:192.0.2.1:1,127.0.0.1:1",
    "ipv6:[::1]:1",
    "ipv6:%5B::1%5D:1",
    "unix:name",
    "unix:/a/path",
    "unix:///a/path",
    "unix-abstract:name",
]
ELSEWHERE = [
    "192.0.2.1:1",
    "128.0.0.1:1",
    "example.org:1",
    "127.example.org:1",
    "localhost.example.org:1",
    "mylocalhost:1",
    "dns:///example.org:1",
    "dns://127.0.0.1/example.org:1",
    "ipv4:192.0.2.1:1",
    "[fe80::1]:1",
    "unix.example.org:1",
]
NAMES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY")
NO_RETRY = RetryPolicy(max_attempts=1)


@pytest.mark.parametrize("target", LOCAL)
def test_targets_of_this_machine(target: str) -> None:
    assert is_local_target(target)


@pytest.mark.parametrize("target", ELSEWHERE)
def test_targets_elsewhere(target: str) -> None:
    assert not is_local_target(target)


def test_urls() -> None:
    assert is_local_url("http://user:pass@localhost:1/path")
    assert is_local_url("http://[::1]:1/")
    assert not is_local_url("https://example.org/localhost")


class Proxy:
    """Takes connections and ends them."""

    def __init__(self, listener: socket.socket) -> None:
        self.asked = threading.Event()
        self._listener = listener
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the end of the test
                return
            self.asked.set()
            connection.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that every variable names, and none excepts anything from."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in NAMES:
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", address.removeprefix("http://"))
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "0.0.0.0/0")
        yield Proxy(listener)
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("form", ["{}", "dns:///{}", "ipv4:{}", "localhost"])
async def test_no_proxy_is_asked_on_the_way_to_this_machine(proxy: Proxy, scripted: Scripted, form: str) -> None:
    target = form.format(scripted.target) if form != "localhost" else scripted.target.replace("127.0.0.1", form)
    with Client(target, retry=NO_RETRY, timeout_s=20) as client:
        assert client.embed("a")
        assert list(client.embed_stream(["a"]))
    async with AsyncClient(target, retry=NO_RETRY, timeout_s=20) as asynchronous:
        assert await asynchronous.embed("a")
        assert [one async for one in asynchronous.embed_stream(["a"])]
    assert health_check.main(["--target", target, "--timeout-s", "20"]) == health_check.SERVING
    assert not proxy.asked.is_set()


def test_other_addresses_go_by_the_proxy_unless_they_must_not(proxy: Proxy) -> None:
    for options in ({"proxy": False}, {}):
        arguments: dict[str, Any] = {"retry": NO_RETRY, "timeout_s": 5, **options}
        with Client("nowhere.invalid:1", **arguments) as client, pytest.raises(ServiceError):
            client.embed("a")
        assert proxy.asked.is_set() == (not options)


def test_a_list_of_addresses_goes_by_no_proxy() -> None:
    """gRPC would ask the proxy for the list as one host."""
    for target in ("ipv4:192.0.2.1:1,192.0.2.2:1", "ipv6:[2001:db8::1]:1%2C[2001:db8::2]:1"):
        assert lists_addresses(target)
        assert channel_options(target) == WITHOUT_PROXY
    for target in (*ELSEWHERE, "dns:///a,b:1"):
        assert not lists_addresses(target)


def test_bilm_health_uses_none_where_it_is_told_so(proxy: Proxy) -> None:
    command = ["--target", "nowhere.invalid:1", "--timeout-s", "5"]
    assert health_check.main([*command, "--no-proxy"]) == health_check.UNREACHABLE
    assert not proxy.asked.is_set()
    assert health_check.main(command) == health_check.UNREACHABLE
    assert proxy.asked.is_set()


def test_a_metrics_page_of_this_machine_is_read_without_a_proxy(proxy: Proxy) -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        assert of_page(f"http://127.0.0.1:{server.server_port}/metrics") != Resources()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert of_page("http://nowhere.invalid/metrics", proxy=False) == Resources()
    assert not proxy.asked.is_set()
    assert of_page("http://nowhere.invalid/metrics") == Resources()
    assert proxy.asked.is_set()
