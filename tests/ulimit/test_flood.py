"""Connections that nobody uses, up to the limit and beyond: who was there is served, health answers, the flood ends."""

import http.client
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import pytest
from bilm_client import Client
from bilm_client.errors import UnavailableError
from bilm_client.policy import RetryPolicy
from grpc_health.v1 import health_pb2

from tests.support.http_calls import call, call_on
from tests.support.processes import descriptors, wait_until
from tests.support.server_processes import ProcessServer
from tests.ulimit.ulimit_support import (
    HELLO,
    LIMIT,
    OWN_CONNECTION,
    SETTINGS_ACK,
    Flood,
    channel,
    check,
    limited_server,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
SILENCE_MS, KEEPALIVE_MS, HEALTH_AGE_MS = 1500, 1000, 1000
SHORT_WAITS = {
    "_SILENCE_MS": SILENCE_MS,
    "_KEEPALIVE_MS": KEEPALIVE_MS,
    "_HEALTH_SILENCE_MS": SILENCE_MS,
    "_HEALTH_AGE_MS": HEALTH_AGE_MS,
}
WAYS = {
    "says nothing": b"",
    "says hello and goes": HELLO,  # and never answers the server's settings
    "answers no ping": HELLO + SETTINGS_ACK,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ProcessServer]:
    """One whose waits are of a second or so."""
    with limited_server(**SHORT_WAITS) as server:
        yield server


def one_shot_check(target: str) -> int:
    with channel(target) as connection:
        return check(connection)


def is_full(server: ProcessServer) -> bool:
    try:
        return one_shot_check(server.target) != SERVING
    except grpc.RpcError:
        return True


@pytest.mark.parametrize("says", WAYS.values(), ids=WAYS.keys())
def test_a_flood_of_idle_connections(server: ProcessServer, says: bytes) -> None:
    before = descriptors(server.pid)
    with (
        Client(server.target, channel_options=OWN_CONNECTION) as caller,
        channel(server.target) as checker,
        Flood(server.port) as flood,
    ):
        caller.embed([["before"]])
        check(checker)
        flood.open(LIMIT * 2, says)
        wait_until(lambda: is_full(server), "the limit is reached")
        check_at_the_limit(server, caller, checker)
        assert descriptors(server.pid) < LIMIT
        wait_until(lambda: flood.alive() == 0, "the flood has ended", 50)  # by gRPC's defaults 60 s or more
        assert one_shot_check(server.target) == SERVING
        caller.embed([["after"]])
    wait_until(lambda: descriptors(server.pid) <= before + 2, "all connections are closed")


def check_at_the_limit(server: ProcessServer, caller: Client, checker: grpc.Channel) -> None:
    """Who was there and who asks the health listener are answered; who comes anew is told at once."""
    for _ in range(10):
        assert one_shot_check(server.health_target) == SERVING
        assert check(checker) == SERVING
        assert len(caller.embed([["during"]])) == 1
    once = RetryPolicy(max_attempts=1)
    with (
        Client(server.target, retry=once, timeout_s=30, channel_options=OWN_CONNECTION) as late,
        pytest.raises(UnavailableError, match="Socket closed|Connection reset|Broken pipe"),
    ):
        late.embed([["late"]])  # at its deadline it would be another error


def test_a_late_caller_is_let_in_by_its_retries(server: ProcessServer) -> None:
    patient = RetryPolicy(max_attempts=5, initial_backoff_s=1.0, max_backoff_s=1.0)
    with Flood(server.port) as flood:
        flood.open(LIMIT)
        wait_until(lambda: is_full(server), "the limit is reached")
        with Client(server.target, retry=patient, channel_options=OWN_CONNECTION) as late:
            assert len(late.embed([["late"]])) == 1


def test_checkers_that_never_close_find_their_connections_closed(server: ProcessServer) -> None:
    """Twice as many as the health listener has room for, forty a second where the age is one second."""
    before, most = descriptors(server.pid), 0
    with ExitStack() as kept:
        for _ in range(128):
            assert check(kept.enter_context(channel(server.health_target))) == SERVING
            most = max(most, descriptors(server.pid) - before)
            time.sleep(1 / 40)  # the rate is what matters
        assert most < 64
        wait_until(lambda: descriptors(server.pid) <= before + 2, "their connections are closed")


def test_a_flood_of_the_health_listener_ends_soon_and_leaves_callers_alone(server: ProcessServer) -> None:
    with Client(server.target, channel_options=OWN_CONNECTION) as caller:
        with Flood(int(server.health_target.rpartition(":")[2])) as flood:
            flood.open(200)
            assert len(caller.embed([["during"]])) == 1
            assert one_shot_check(server.target) == SERVING
            wait_until(lambda: flood.alive() == 0, "the flood has ended")
            assert one_shot_check(server.health_target) == SERVING
        assert len(caller.embed([["after"]])) == 1


@pytest.mark.parametrize(
    "says", [b"", b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"]
)
def test_a_flood_of_http_connections_fills_their_own_share(says: bytes) -> None:
    """Half of all connections is HTTP's: gRPC and health have theirs, and so has who was there before."""
    with limited_server("--http-listen", "127.0.0.1:0") as server, http_connection(server) as kept:
        before = descriptors(server.pid)
        with (
            Client(server.target, channel_options=OWN_CONNECTION) as caller,
            Flood(int(server.http_address.rpartition(":")[2])) as flood,
        ):
            flood.open(LIMIT, says)
            wait_until(lambda: flood.alive() < LIMIT // 2, "those beyond the share are closed")
            assert descriptors(server.pid) < LIMIT
            assert call_on(kept, "POST", "/v1/embeddings", {"input": "during"}).status == 200
            assert len(caller.embed([["during"]])) == 1
            assert one_shot_check(server.target) == one_shot_check(server.health_target) == SERVING
            with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
                call(server.http_address, "GET", "/readyz")
        wait_until(lambda: descriptors(server.pid) <= before + 2, "all connections are closed")
        assert call(server.http_address, "GET", "/readyz").status == 200


@contextmanager
def http_connection(server: ProcessServer) -> Iterator[http.client.HTTPConnection]:
    """A connection that has been used."""
    host, _, port = server.http_address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        assert call_on(connection, "GET", "/readyz").status == 200
        yield connection
    finally:
        connection.close()


def test_the_health_listener_serves_nothing_else(server: ProcessServer) -> None:
    with (
        Client(server.health_target, channel_options=OWN_CONNECTION) as client,
        pytest.raises(Exception, match="Method not found") as error,
    ):
        client.model_info()
    assert getattr(error.value, "code", None) is grpc.StatusCode.UNIMPLEMENTED


def test_connections_that_answer_pings_end_by_age_without_a_lost_call() -> None:
    """Idle gRPC channels fill a server up to its limit; at their age they are asked to go, and the caller stays."""
    age_s = 3.0
    with (
        limited_server("--max-connections", "40", "--max-connection-age-s", f"{age_s}", **SHORT_WAITS) as server,
        Client(server.target, retry=RetryPolicy(max_attempts=1), channel_options=OWN_CONNECTION) as caller,
        ExitStack() as kept,
    ):
        before = descriptors(server.pid)
        caller.embed([["first"]])
        for _ in range(39):
            check(kept.enter_context(channel(server.target)))
        assert is_full(server)
        wait_until(lambda: descriptors(server.pid) <= before + 2, "idle connections are closed")
        assert one_shot_check(server.target) == SERVING
        ends_s = time.monotonic() + 2 * age_s
        while time.monotonic() < ends_s:  # through two ages, without retry
            assert len(caller.embed([["still"]])) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("says", "longest_s"), list(zip(WAYS.values(), (20, 20, 80), strict=True)), ids=list(WAYS.keys())
)
def test_how_long_idle_connections_stay(says: bytes, longest_s: float) -> None:
    """With the server's own waits: silence for 20 s; a ping after 60 s, and 20 s for its answer."""
    with limited_server() as server, Flood(server.port) as flood:
        flood.open(LIMIT, says)
        wait_until(lambda: is_full(server), "the limit is reached")
        ended_s = wait_until(lambda: flood.alive() == 0, "the flood has ended", longest_s + 10)
        print(f"{longest_s} s expected, {ended_s:.1f} s")
        assert one_shot_check(server.target) == SERVING
