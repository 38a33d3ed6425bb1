"""Servers and clients as processes of their own under a low `ulimit -n`, and what they hold."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import ROOT, module_command

LIMIT = 256
"""Of descriptors, for servers and clients."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Channels of a process to the same address share a connection otherwise, and a leak goes unseen."""
MIB = 2**20

_START_S = 240.0
_WAIT_S = 60.0
# The same server with shorter waits: what takes minutes otherwise
_IMPATIENT = (
    "import sys, bilm_server.protocols.grpc.connections as d, bilm_server.main as m; {}; sys.exit(m.main(sys.argv[1:]))"
)


@dataclass(frozen=True)
class LimitedServer:
    """A server to try.

    Attributes:
        process: it, with its standard error piped.
        target: where it serves.
        health_target: where it answers for its health alone.
        log: lines that it has written, growing.
    """

    process: "subprocess.Popen[str]"
    target: str
    health_target: str
    log: list[str]

    @property
    def port(self) -> int:
        return int(self.target.rpartition(":")[2])

    @property
    def connections(self) -> int:
        """How many it says fit."""
        return next(int(found[1]) for line in self.log if (found := re.search(r"only (\d+) connections fit", line)))


@contextmanager
def limited_server(*flags: str, limit: int = LIMIT, **waits_ms: int) -> Iterator[LimitedServer]:
    """A server that is SERVING.

    Args:
        flags: further ones.
        limit: of descriptors.
        waits_ms: constants of bilm_server.protocols.grpc.connections to replace.
    """
    changes = ", ".join(f"setattr(d, {name!r}, {value})" for name, value in waits_ms.items()) or "None"
    listen = ["--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0", "--drain-delay-s", "0"]
    command = [sys.executable, "-c", _IMPATIENT.format(changes), "--model", "random:tiny", *listen, *flags]
    process = subprocess.Popen(limited(command, limit), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log: list[str] = []
    serving = threading.Event()
    reader = threading.Thread(target=_read, args=(process.stderr, log, serving))  # for as long as it writes
    reader.start()
    try:
        assert serving.wait(_START_S), "".join(log)
        assert process.poll() is None, "".join(log)
        text = "".join(log)
        yield LimitedServer(process, _found(r"listening on (\S+)", text), _found(r"health alone on (\S+)", text), log)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def limited(command: list[str], limit: int = LIMIT) -> list[str]:
    """The command that runs another under a limit of descriptors."""
    return ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh", *command]


def _read(lines: Any, log: list[str], serving: threading.Event) -> None:
    for line in lines:
        log.append(line)
        if "health: SERVING" in line:
            serving.set()
    serving.set()  # it ended


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, text
    return found[1]


# ---- what a process holds ----


def descriptors(process_id: int) -> int:
    return len(list(Path(f"/proc/{process_id}/fd").iterdir()))


def resident_bytes(process_id: int) -> int:
    text = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    return int(_found(r"VmRSS:\s+(\d+) kB", text)) * 1024


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = _WAIT_S) -> float:
    """Seconds until `condition`: what another process does has no event here."""
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begun_s < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - begun_s


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
    done = subprocess.run(limited(command), cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
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
