"""A real HAProxy before real replicas, under load, each in a process of its own."""

import csv
import grp
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bilm_client import Client
from numpy.typing import NDArray

from tests.support.server_processes import ProcessServer

ROOT = Path(__file__).parents[2]
HAPROXY_CONFIG = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
ENVOY_CONFIG = ROOT / "deploy" / "envoy" / "envoy.yaml"
REPLICA_NAMES = ("replica1", "replica2")
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Channels of one process to one address share a connection otherwise."""

SMALL = [["A", "small", "call", str(number)] for number in range(40)]
LONG = [["long"] * 3000]
_MAX_CALLS = 50_000
_THINK_S = 0.005  # the replicas and their restarts need the cores, too
_POLL_S = 0.02

Vectors = NDArray[Any]


def program(name: str) -> str:
    """The path of a program; skips the test without it."""
    places = (None, str(Path(sys.executable).parent), "/usr/sbin:/sbin")
    found = next((path for place in places if (path := shutil.which(name, path=place))), None)
    if found is None:
        pytest.skip(f"needs the program {name}")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: a restarted replica needs the port that it had."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def poll(what: str, condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until `condition`; for what other programs don't tell by themselves."""
    begun_s = time.monotonic()
    while not condition():
        passed_s = time.monotonic() - begun_s
        assert passed_s < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(_POLL_S)
    return time.monotonic() - begun_s


class Replica(ProcessServer):
    """A server process that is killed and started again, always on the same ports."""

    def __init__(self, name: str, port: int, health_port: int, *flags: str) -> None:
        listen, health_listen = f"127.0.0.1:{port}", f"127.0.0.1:{health_port}"
        super().__init__("--served-model-name", name, "--health-listen", health_listen, *flags, listen=listen)
        self.name, self.health_port = name, health_port

    def is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class HAProxy:
    """HAProxy with the configuration that is deployed."""

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        [port] = free_ports(1)
        self.target = f"127.0.0.1:{port}"
        self._socket_path = str(folder / "stats")
        self._log_path = folder / "haproxy.log"
        self._environment = {
            "BILM_HAPROXY_SOCKET": self._socket_path,
            "BILM_HAPROXY_BIND": self.target,
            "BILM_HAPROXY_USER": pwd.getpwuid(os.geteuid()).pw_name,
            "BILM_HAPROXY_GROUP": grp.getgrgid(os.getegid()).gr_name,
            **addresses,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [program("haproxy"), "-db", "-f", str(HAPROXY_CONFIG)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **self._environment}, stdout=log, stderr=subprocess.STDOUT
            )
        poll("HAProxy's socket", self._answers, 20)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def servers(self) -> dict[str, dict[str, str]]:
        """`show stat`, by server."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._socket_path)
            connection.sendall(b"show stat\n")
            text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return {row["svname"]: row for row in rows if row["svname"] in REPLICA_NAMES}

    def status(self, name: str) -> str:
        """UP, DOWN or NOLB, without how many checks are missing to the next."""
        return self.servers()[name]["status"].split()[0]

    def wait_until_spread(self, timeout_s: float) -> float:
        """Seconds until each server has a quarter of the connections."""

        def is_spread() -> bool:
            connections = [int(row["scur"]) for row in self.servers().values()]
            return min(connections) * 4 >= sum(connections) > 0

        return poll("connections to both replicas", is_spread, timeout_s)

    def wait_for(self, name: str, status: str, timeout_s: float) -> float:
        """Seconds until the server has that status."""
        try:
            return poll(f"{name} {status}", lambda: self.status(name) == status, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; HAProxy's log:\n{self.log()}") from None

    def log(self) -> str:
        return self._log_path.read_text()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log_path.read_text()
        try:
            return len(self.servers()) == len(REPLICA_NAMES)
        except (FileNotFoundError, ConnectionRefusedError):
            return False


class Envoy:
    """Envoy with the configuration that is deployed, but other ports."""

    def __init__(self, folder: Path, replicas: Iterable[Replica]) -> None:
        port, self._admin_port = free_ports(2)
        self.target = f"127.0.0.1:{port}"
        self._replicas = {replica.name: replica for replica in replicas}
        self._config_path, self._log_path = folder / "envoy.json", folder / "envoy.log"
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._config_path.write_text(json.dumps(self._config()))
        command = [program("envoy"), "--use-dynamic-base-id", "--concurrency", "1", "-c", str(self._config_path)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        for name in self._replicas:
            self.wait_for(name, healthy=True, timeout_s=60)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def wait_for(self, name: str, *, healthy: bool, timeout_s: float) -> float:
        """Seconds until a replica passes its checks, or fails them."""
        return poll(f"{name} healthy: {healthy}", lambda: self._health().get(name) is healthy, timeout_s)

    def _config(self) -> Any:
        config = yaml.safe_load(ENVOY_CONFIG.read_text())
        resources = config["static_resources"]
        _set_port(config["admin"], self._admin_port)
        _set_port(resources["listeners"][0], self._port)
        endpoints = resources["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        for replica, each in zip(self._replicas.values(), endpoints, strict=True):
            _set_port(each["endpoint"], replica.port)
            each["endpoint"]["health_check_config"]["port_value"] = replica.health_port
        return config

    def _health(self) -> dict[str, bool]:
        assert self._process is not None
        assert self._process.poll() is None, self._log_path.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._admin_port}/clusters?format=json") as answer:
                [cluster] = json.load(answer)["cluster_statuses"]
        except urllib.error.URLError:  # not listening yet
            return {}
        ports = {replica.port: name for name, replica in self._replicas.items()}
        hosts = cluster.get("host_statuses", [])
        return {ports[host["address"]["socket_address"]["port_value"]]: _is_healthy(host) for host in hosts}


def _is_healthy(host: dict[str, Any]) -> bool:
    status = host["health_status"]
    return status["eds_health_status"] == "HEALTHY" and not status.get("failed_active_health_check", False)


def _set_port(owner: dict[str, Any], port: int) -> None:
    owner["address"]["socket_address"]["port_value"] = port


class Load:
    """Callers in a closed loop, each with a connection of its own; every answer is compared with the known one."""

    def __init__(self, target: str, known: dict[str, list[Vectors]], *, small: int = 4) -> None:
        self._target, self._known = target, known
        self._stop = threading.Event()
        work: list[Callable[[Client], None]] = [*[self._small_calls] * small, self._long_calls, self._stream]
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in work]
        self._lock = threading.Lock()
        self.failures: list[str] = []
        self.calls = 0
        self.slowest_s = 0.0
        self.served_by: Counter[str] = Counter()

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        poll("calls of the load", lambda: self.calls > 20 or bool(self.failures), 60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_until_spread(self, timeout_s: float) -> float:
        """Seconds until each replica has answered a tenth of the last calls: one that has just started is slower."""
        last = Counter(self.served_by)

        def is_spread() -> bool:
            nonlocal last
            fresh = self.served_by - last
            if fresh.total() < 50:
                return False
            last = Counter(self.served_by)
            return min(fresh[name] for name in REPLICA_NAMES) * 10 >= fresh.total()

        try:
            return poll("load on both replicas", is_spread, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; answered by {dict(self.served_by)}, failures {self.failures}") from None

    def _run(self, work: Callable[[Client], None]) -> None:
        with Client(self._target, timeout_s=30, channel_options=OWN_CONNECTION) as client:
            while not self._stop.is_set() and self.calls < _MAX_CALLS and len(self.failures) < 10:
                begun_s = time.monotonic()
                try:
                    work(client)
                except Exception as error:
                    self.failures.append(f"{work.__name__}: {error!r}")
                with self._lock:
                    self.calls += 1
                    self.slowest_s = max(self.slowest_s, time.monotonic() - begun_s)
                self._stop.wait(_THINK_S)

    def _small_calls(self, client: Client) -> None:
        name = client.model_info().name
        with self._lock:
            self.served_by[name] += 1
        which = self.calls % len(SMALL)
        [found] = client.embed([SMALL[which]])
        self._compare("small", which, found.vectors)

    def _long_calls(self, client: Client) -> None:
        [found] = client.embed(LONG, pool="mean")
        self._compare("long", 0, found.vectors)

    def _stream(self, client: Client) -> None:
        for which, found in enumerate(client.embed_stream(SMALL)):
            self._compare("small", which, found.vectors)

    def _compare(self, kind: str, which: int, vectors: Vectors) -> None:
        if not np.array_equal(vectors, self._known[kind][which]):
            self.failures.append(f"{kind} {which}: a wrong answer")


class Cluster:
    """Two replicas behind HAProxy, and what they answer."""

    def __init__(self, haproxy: HAProxy, replicas: dict[str, Replica], known: dict[str, list[Vectors]]) -> None:
        self.haproxy, self.replicas, self._known = haproxy, replicas, known

    def load(self, target: str = "") -> Load:
        return Load(target or self.haproxy.target, self._known)

    def restart(self, replica: Replica) -> float:
        """Starts a replica that has ended; seconds from its SERVING until HAProxy has put it back."""
        replica.start()
        return self.haproxy.wait_for(replica.name, "UP", 20)


@contextmanager
def cluster(*flags: str) -> Iterator[Cluster]:
    """Two replicas behind HAProxy, all healthy."""
    program("haproxy")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bilm-")))
        ports = iter(free_ports(4))
        replicas = {name: Replica(name, next(ports), next(ports), *flags) for name in REPLICA_NAMES}
        for replica in replicas.values():
            stack.enter_context(replica)
        known, also = (known_answers(replica.target) for replica in replicas.values())
        assert all(map(np.array_equal, known["small"] + known["long"], also["small"] + also["long"]))
        haproxy = HAProxy(folder, addresses((each.port, each.health_port) for each in replicas.values()))
        stack.callback(haproxy.stop)
        haproxy.start()
        for name in REPLICA_NAMES:
            haproxy.wait_for(name, "UP", 20)
        yield Cluster(haproxy, replicas, known)


def addresses(ports: Iterable[tuple[int, int]]) -> dict[str, str]:
    """What HAProxy's configuration takes from the environment, from each replica's port and health port."""
    found: dict[str, str] = {}
    for number, (port, health_port) in enumerate(ports, start=1):
        found[f"BILM_REPLICA_{number}"] = f"127.0.0.1:{port}"
        found[f"BILM_REPLICA_{number}_HEALTH_PORT"] = str(health_port)
    return found


def known_answers(target: str) -> dict[str, list[Vectors]]:
    """What a replica answers when it is asked directly."""
    with Client(target, channel_options=OWN_CONNECTION) as client:
        small = [each.vectors for each in client.embed(SMALL)]
        return {"small": small, "long": [each.vectors for each in client.embed(LONG, pool="mean")]}
