"""Connections that break in every way: no answer is wrong, no call hangs, and nothing is left behind."""

import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from bilm_client import Client, Keepalive, RetryPolicy
from bilm_client.errors import DeadlineError, UnavailableError

from tests.fault.fault_support import missing, missing_namespace
from tests.fault.known_answers import OPTIONS, KnownAnswers
from tests.fault.proxy import FaultyProxy
from tests.support.processes import ROOT, module_command, wait_until
from tests.support.servers import LoopServer, serving

FAST = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
)
# More patient than the default, because on a busy machine a new connection may take a while
PATIENT = RetryPolicy(max_attempts=5, initial_backoff_s=0.3, throttle_tokens=1000)
LIMIT_S = 30.0
MARGIN_S = 30.0  # what a busy machine may add to a deadline; a call without one would never end


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving("--log-level", "warning") as server:
        yield server


@pytest.fixture(scope="module")
def known(server: LoopServer) -> KnownAnswers:
    known = KnownAnswers()
    with Client(server.target) as client:
        known.ask(client)
    return known


@pytest.fixture
def proxy(server: LoopServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(int(server.target.rpartition(":")[2])) as proxy:
        yield proxy
    wait_until(lambda: used_tokens(server) == 0, "the work of the broken connections is given up")


@pytest.fixture
def client(proxy: FaultyProxy) -> Iterator[Client]:
    with Client(proxy.target, retry=PATIENT, timeout_s=LIMIT_S, channel_options=FAST) as client:
        yield client


def used_tokens(server: LoopServer) -> int:
    return server.admission.used.tokens + server.stream_admission.used.tokens


def ask(client: Client, known: KnownAnswers, chance: random.Random) -> None:
    options, index = chance.randrange(len(OPTIONS)), chance.randrange(len(known.corpus))
    (found,) = client.embed([known.corpus[index]], **OPTIONS[options])
    known.check(found, options, index)


def read_document(client: Client, known: KnownAnswers, document: int) -> None:
    results = client.embed_stream(known.document(document), carry_state=True, return_state_every=3)
    for position, found in enumerate(results):
        known.check_in_document(found, document, position)
    assert position == len(known.document(document)) - 1


def test_a_slow_network_changes_no_answer(proxy: FaultyProxy, client: Client, known: KnownAnswers) -> None:
    proxy.delay_s = 0.02
    chance = random.Random(1)
    for _ in range(5):
        ask(client, known, chance)
    read_document(client, known, 0)


def test_cut_connections_cost_no_call(proxy: FaultyProxy, client: Client, known: KnownAnswers) -> None:
    """Both ends are reset again and again, in the middle of calls and of streams, until that has happened often."""
    proxy.delay_s = 0.005  # so that there is a middle to be hit
    cut_often, done = threading.Event(), threading.Event()

    def cut() -> None:
        while not done.wait(0.5):
            proxy.reset()
            if proxy.n_accepted > 4:  # as many connections were made anew
                cut_often.set()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        end_s = time.monotonic() + 60
        while not cut_often.is_set():
            assert time.monotonic() < end_s, "nothing was cut"
            ask(client, known, chance)
            read_document(client, known, seed)

    with ThreadPoolExecutor(4) as pool:
        pool.submit(cut)
        try:
            for future in [pool.submit(work, seed) for seed in range(3)]:
                future.result()
        finally:
            done.set()


def test_a_connection_that_breaks_in_the_middle_of_an_answer(
    proxy: FaultyProxy, client: Client, known: KnownAnswers
) -> None:
    """gRPC retries no call that has got a part of its answer; the client goes on by stream."""
    sentence = ["w"] * 2000
    (whole,) = client.embed([sentence])
    for in_bytes in (100, 20_000, whole.vectors.nbytes // 2):
        proxy.cut_in_bytes = in_bytes
        (found,) = client.embed([sentence])
        assert found.vectors.tobytes() == whole.vectors.tobytes()
    assert proxy.n_cuts == 3
    proxy.cut_in_bytes = 20_000
    once = RetryPolicy(max_attempts=1)
    with Client(proxy.target, retry=once, channel_options=FAST) as impatient, pytest.raises(UnavailableError):
        impatient.embed([sentence])


@pytest.mark.parametrize("side", ["client", "server"])
def test_half_a_connection(
    proxy: FaultyProxy, client: Client, known: KnownAnswers, side: Literal["client", "server"]
) -> None:
    """One end hears that the connection is finished; the other one is left waiting, and its deadline holds."""
    chance = random.Random(2)
    ask(client, known, chance)
    proxy.finish(side)
    if side == "client":
        ask(client, known, chance)  # it knows, and makes another connection
        assert proxy.n_accepted == 2
    else:
        with pytest.raises(DeadlineError):
            client.embed(["a"], timeout_s=1.0)
        proxy.reset()
        ask(client, known, chance)


def test_a_black_hole_ends_at_the_deadline(proxy: FaultyProxy, client: Client, known: KnownAnswers) -> None:
    chance = random.Random(3)
    ask(client, known, chance)
    proxy.hold()
    with pytest.raises(DeadlineError):
        client.embed(["a"], timeout_s=1.0)
    with pytest.raises(DeadlineError):
        list(client.embed_stream(["a"], timeout_s=1.0))
    proxy.go_on()
    ask(client, known, chance)
    assert proxy.n_accepted == 1  # it was the network's fault, not the connection's


def test_keepalive_finds_a_dead_connection(proxy: FaultyProxy, known: KnownAnswers) -> None:
    """Before the call's deadline: the call itself then goes over another connection."""
    quick = Keepalive(time_s=1.0, timeout_s=1.0)
    with Client(proxy.target, retry=PATIENT, keepalive=quick, timeout_s=LIMIT_S, channel_options=FAST) as client:
        ask(client, known, random.Random(4))
        proxy.swallow()
        ask(client, known, random.Random(5))
        assert proxy.n_accepted == 2


def test_a_server_that_refuses_connections_is_told_by_a_status(proxy: FaultyProxy) -> None:
    proxy.refusing = True
    once = RetryPolicy(max_attempts=1)
    with Client(proxy.target, retry=once, timeout_s=LIMIT_S, channel_options=FAST) as client:
        with pytest.raises(UnavailableError):
            client.embed(["a"])
        with pytest.raises(UnavailableError):
            list(client.embed_stream(["a"]))


def test_calls_on_a_cut_connection_are_given_up(server: LoopServer, proxy: FaultyProxy) -> None:
    """The server hears of the cut, and computes no further for nobody."""
    document = [["w"] * 20_000] * 3
    once = RetryPolicy(max_attempts=1)
    with Client(proxy.target, retry=once, channel_options=FAST) as client, ThreadPoolExecutor(1) as pool:
        failing = pool.submit(lambda: list(client.embed_stream(document, pool="mean", timeout_s=LIMIT_S)))
        wait_until(lambda: used_tokens(server) > 0, "the work begins")
        proxy.reset()
        with pytest.raises(UnavailableError):
            failing.result()
        wait_until(lambda: used_tokens(server) == 0, "the work is given up")


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of calls in a network namespace in which packets get lost."""
    if reason := missing("nft") or missing_namespace("--net"):
        pytest.skip(reason)
    command = module_command("tests.fault.lossy_network", str(tmp_path_factory.mktemp("lossy")))
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    found: dict[str, dict[str, Any]] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lost packets", "packet resets"])
def test_lost_packets_cost_no_call(lossy: dict[str, dict[str, Any]], fault: str) -> None:
    found = lossy[fault]
    assert found["packets_hit"] > 0
    assert found["wrong"] == []
    assert found["failed"] == {}
    assert found["slowest_s"] < found["limit_s"] + MARGIN_S


@pytest.mark.slow
def test_a_dead_network_is_told_by_a_status(lossy: dict[str, dict[str, Any]]) -> None:
    found = lossy["dead"]
    assert found["wrong"] == []
    assert set(found["failed"]) <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert found["failed"]
    assert found["slowest_s"] < found["limit_s"] + MARGIN_S
    assert lossy["healed"]["failed"] == {}
    assert lossy["healed"]["right"] > 0


@pytest.mark.slow
def test_lost_packets_leave_nothing_behind(lossy: dict[str, dict[str, Any]]) -> None:
    held = lossy["held"]
    assert held["descriptors_after"] <= held["descriptors_before"] + 2
    assert held["mib_after"] < held["mib_before"] + 64
