"""HAProxy before two replicas: what it makes of a dead, a draining and a hung one, and what callers see of it."""

import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.fault.balancer_support import OWN_CONNECTION, Cluster, Envoy, HAProxy, Load, addresses, cluster, poll
from tests.integration.integration_support import PLAIN, tokens

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
OUT_S, BACK_S = 3.0, 3.0
_DRAIN_DELAY_S = 2


@pytest.fixture(scope="module")
def behind() -> Iterator[Cluster]:
    """Two replicas whose connections are opened anew every two seconds."""
    flags = ("--max-connection-age-s", "2", "--drain-delay-s", str(_DRAIN_DELAY_S), "--grace-s", "60")
    with cluster(*flags) as running:
        yield running


def victim_of(load: Load) -> str:
    """A replica that has callers."""
    return load.served_by.most_common(1)[0][0]


def check_back_and_spread(behind: Cluster, load: Load, back_s: float, name: str) -> None:
    connections_s, calls_s = behind.haproxy.wait_until_spread(20), load.wait_until_spread(20)
    print(
        f"{name}: back {back_s:.2f} s after SERVING, connections spread in {connections_s:.1f} s, calls {calls_s:.1f} s"
    )
    assert back_s < BACK_S


def check_callers(load: Load) -> None:
    print(f"{load.calls} calls, slowest {load.slowest_s:.2f} s, by replica {dict(load.served_by)}")
    assert load.failures == []
    assert load.calls > 100


@pytest.mark.slow
def test_a_killed_replica(behind: Cluster) -> None:
    with behind.load() as load:
        name = victim_of(load)
        behind.replicas[name].send_signal(signal.SIGKILL)
        out_s = behind.haproxy.wait_for(name, "DOWN", 20)
        behind.replicas[name].wait()
        back_s = behind.restart(behind.replicas[name])
        check_back_and_spread(behind, load, back_s, f"killed, out after {out_s:.2f} s")
    check_callers(load)
    assert out_s < OUT_S


@pytest.mark.slow
def test_a_hung_replica(behind: Cluster) -> None:
    with behind.load() as load:
        name = victim_of(load)
        behind.replicas[name].send_signal(signal.SIGSTOP)
        out_s = behind.haproxy.wait_for(name, "DOWN", 20)
        poll("its connections shut", lambda: behind.haproxy.servers()[name]["scur"] == "0", 2)
        behind.replicas[name].send_signal(signal.SIGCONT)
        back_s = behind.haproxy.wait_for(name, "UP", 20)
        check_back_and_spread(behind, load, back_s, f"hung, out after {out_s:.2f} s")
    check_callers(load)
    assert out_s < OUT_S


class OpenStream:
    """A stream without any retry or resumption, as a caller in the midst of long work has it."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, [*OWN_CONNECTION, ("grpc.enable_retries", 0)])
        stub = embed_pb2_grpc.EmbedServiceStub(self._channel)
        self.replica = stub.GetModel(embed_pb2.GetModelRequest(), timeout=60).name
        self._requests: SimpleQueue[embed_pb2.EmbedStreamRequest | None] = SimpleQueue()
        self._requests.put(embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=PLAIN)))
        self._call = stub.EmbedStream(iter(self._requests.get, None), timeout=100)
        self._sent = 0

    def embed(self) -> embed_pb2.EmbedStreamResponse:
        """The answer to one more sentence."""
        self._sent += 1
        item = embed_pb2.StreamItem(id=self._sent, sentence=tokens("in", "flight"))
        self._requests.put(embed_pb2.EmbedStreamRequest(item=item))
        response: embed_pb2.EmbedStreamResponse = next(self._call)
        return response

    def end(self) -> grpc.StatusCode:
        self._requests.put(None)
        assert list(self._call) == []
        code: grpc.StatusCode = self._call.code()
        self._channel.close()
        return code


@pytest.mark.slow
def test_a_drained_replica(behind: Cluster) -> None:
    with behind.load() as load:
        stream = OpenStream(behind.haproxy.target)
        name, known = stream.replica, vectors(stream.embed())
        replica = behind.replicas[name]
        replica.send_signal(signal.SIGTERM)
        out_s = behind.haproxy.wait_for(name, "NOLB", 20)
        connections = behind.haproxy.servers()[name]["stot"]
        poll("the main port closed", lambda: not replica.is_listening(), _DRAIN_DELAY_S + 20)
        checked = ThreadPoolExecutor(1).submit(stays, behind.haproxy, name, "NOLB", OUT_S + 1)
        while not checked.done():  # far beyond the time after which a failed check would have cut it
            assert vectors(stream.embed()) == known
        checked.result()
        assert behind.haproxy.servers()[name]["stot"] == connections
        assert stream.end() is grpc.StatusCode.OK
        assert replica.wait(240) == 0, replica.text()
        back_s = behind.restart(replica)
        check_back_and_spread(behind, load, back_s, f"drained, out after {out_s:.2f} s")
    check_callers(load)
    assert out_s < OUT_S


def vectors(response: embed_pb2.EmbedStreamResponse) -> bytes:
    return response.rows.embedding.tensor.data


def stays(haproxy: HAProxy, name: str, status: str, for_s: float) -> None:
    """Looks for some seconds whether a server keeps its status."""
    with pytest.raises(AssertionError, match="another status: not within"):
        poll("another status", lambda: haproxy.status(name) != status, for_s)


@pytest.fixture
def envoy(behind: Cluster) -> Iterator[Envoy]:
    with tempfile.TemporaryDirectory(prefix="bilm-") as folder:
        envoy = Envoy(Path(folder), behind.replicas.values())
        try:
            envoy.start()
            yield envoy
        finally:
            envoy.stop()


@pytest.mark.slow
def test_envoy_with_a_hung_and_a_drained_replica(behind: Cluster, envoy: Envoy) -> None:
    with behind.load(envoy.target) as load:
        name = victim_of(load)
        replica = behind.replicas[name]
        replica.send_signal(signal.SIGSTOP)
        out_s = envoy.wait_for(name, healthy=False, timeout_s=20)
        replica.send_signal(signal.SIGCONT)
        back_s = envoy.wait_for(name, healthy=True, timeout_s=20)
        load.wait_until_spread(20)
        replica.send_signal(signal.SIGTERM)
        assert replica.wait(240) == 0, replica.text()
        behind.restart(replica)
        envoy.wait_for(name, healthy=True, timeout_s=20)
        load.wait_until_spread(20)
    print(f"Envoy: hung, out after {out_s:.2f} s, back after {back_s:.2f} s")
    check_callers(load)
    assert out_s < OUT_S
    assert back_s < BACK_S


# ---- the check alone, against a health service that says what it is told ----


class Said:
    """Two health services without a model behind them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4)
        self.servers = [grpc.server(self._pool) for _ in range(2)]
        self.health = [health.HealthServicer() for _ in range(2)]
        self.ports = []
        for server, servicer in zip(self.servers, self.health, strict=True):
            health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
            self.ports.append(server.add_insecure_port("127.0.0.1:0"))
            server.start()

    def say(self, inference: int | None, readiness: int) -> None:
        """What the first one answers; None: nothing about inference."""
        self.health[0].set("", readiness)
        if inference is not None:
            self.health[0].set("inference", inference)

    def stop(self) -> None:
        for server in self.servers:
            server.stop(0).wait()
        self._pool.shutdown()


@pytest.fixture
def said() -> Iterator[Said]:
    said = Said()
    yield said
    said.stop()


@pytest.fixture
def checking(said: Said) -> Iterator[HAProxy]:
    """HAProxy, checking what `said` says."""
    with tempfile.TemporaryDirectory(prefix="bilm-") as folder:
        haproxy = HAProxy(Path(folder), addresses([(port, port) for port in said.ports]))
        haproxy.start()
        yield haproxy
        haproxy.stop()


def test_what_the_check_makes_of_each_answer(said: Said, checking: HAProxy) -> None:
    said.health[1].set("inference", SERVING)
    expected = [
        ("DOWN", None, SERVING),  # NOT_FOUND: another program has the port
        ("UP", SERVING, SERVING),
        ("NOLB", SERVING, NOT_SERVING),  # it drains
        ("UP", SERVING, SERVING),
        ("DOWN", NOT_SERVING, NOT_SERVING),  # the model fails
        ("UP", SERVING, SERVING),
    ]
    for status, inference, readiness in expected:
        said.say(inference, readiness)
        assert checking.wait_for("replica1", status, 20) < OUT_S
        assert checking.status("replica2") == "UP"
