"""Servers and clients as processes of their own under a low `ulimit -n`, and what they hold."""

import json
import re
import socket
import subprocess
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import MIB, ROOT, module_command
from tests.support.server_processes import ProcessServer, limited
from tests.ulimit import impatient_server

LIMIT = 256
"""Of descriptors, for servers and clients."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Channels of a process to the same address share a connection otherwise, and a leak goes unseen."""


def limited_server(*flags: str, **waits_ms: int) -> ProcessServer:
    """Return a server with a health listener, under a limit of descriptors; enter it to start it.

    Args:
        flags: Further ones.
        waits_ms: Constants of bilm_server.protocols.grpc.connections to replace: what takes minutes otherwise.
    """
    listen = ("--health-listen", "127.0.0.1:0")
    environment = {impatient_server.WAITS: json.dumps(waits_ms)}
    module = impatient_server.__name__ if waits_ms else "bilm_server.main"
    return ProcessServer(*listen, *flags, max_descriptors=LIMIT, module=module, environment=environment)


def max_connections(server: ProcessServer) -> int:
    """Return how many connections the server says fit."""
    return next(int(found[1]) for line in server.lines if (found := re.search(r"only (\d+) connections fit", line)))


# ---- what a process holds ----


@dataclass(frozen=True)
class Holding:
    """What client and server hold after some cycles.

    Attributes:
        cycles: how many.
        client_descriptors: open ones.
        client_bytes: resident.
        server_descriptors: open ones.
        server_bytes: resident.
    """

    cycles: int
    client_descriptors: int
    client_bytes: int
    server_descriptors: int
    server_bytes: int


MAX_MORE_DESCRIPTORS = 2
"""Threads of gRPC come and go, and may have one each."""


def growth_complaints(middle: Holding, end: Holding, max_more_bytes: int) -> list[str]:
    """What is not flat from the middle of the cycles to their end."""
    found = []
    for side in ("client", "server"):
        more = getattr(end, f"{side}_descriptors") - getattr(middle, f"{side}_descriptors")
        if more > MAX_MORE_DESCRIPTORS:
            found.append(f"{side}: {more} descriptors more")
        more_bytes = getattr(end, f"{side}_bytes") - getattr(middle, f"{side}_bytes")
        if more_bytes > max_more_bytes:
            found.append(f"{side}: {more_bytes / MIB:.1f} MiB more")
    return found


def churn(kind: str, target: str, server_process_id: int, cycles: int) -> list[Holding]:
    """Run `churn`; what was held after the warm-up, in the middle and at the end."""
    command = module_command("tests.ulimit.churn", kind, target, str(server_process_id), str(cycles))
    done = subprocess.run(limited(command, LIMIT), cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Holding(**json.loads(line)) for line in done.stdout.splitlines()]


def table_row(name: str, held: list[Holding]) -> str:
    """A row of the table in docs/descriptors.md: after the warm-up -> in the middle -> at the end."""
    columns = [str(held[-1].cycles)]
    for side in ("client", "server"):
        columns.append(" → ".join(str(getattr(each, f"{side}_descriptors")) for each in held))
        columns.append(" → ".join(f"{getattr(each, f'{side}_bytes') / MIB:.1f}" for each in held))
    return f"| {name} | {' | '.join(columns)} |"


# ---- connections that nobody uses ----

SETTINGS, SETTINGS_ACK = b"\0\0\0\x04\0\0\0\0\0", b"\0\0\0\x04\x01\0\0\0\0"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS


class Flood:
    """Raw connections that say little and then nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> "Flood":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()

    def open(self, count: int, says: bytes = b"") -> None:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", self._port), timeout=60)
            self._sockets.append(connection)
            connection.setblocking(False)
            try:
                connection.sendall(says)
            except (BrokenPipeError, ConnectionResetError):  # refused already
                continue

    def alive(self) -> int:
        """How many the server hasn't closed."""
        return sum(map(_is_open, self._sockets))


def _is_open(connection: socket.socket) -> bool:
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    return False


def channel(target: str) -> grpc.Channel:
    """One with a connection of its own."""
    return grpc.insecure_channel(target, options=OWN_CONNECTION)


def check(connection: grpc.Channel, timeout_s: float = 10.0) -> int:
    """A health check's status, without retry.

    Raises:
        grpc.RpcError: as it came.
    """
    stub: Any = health_pb2_grpc.HealthStub(connection)
    return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s).status)
