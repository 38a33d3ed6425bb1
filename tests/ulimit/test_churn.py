"""Descriptors and memory stay flat, whoever comes and goes; `pytest -s -m slow tests/ulimit` prints the table."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import MIB, descriptors, resident_bytes, wait_until
from tests.support.server_processes import ProcessServer, limited
from tests.ulimit.ulimit_support import (
    LIMIT,
    MAX_MORE_DESCRIPTORS,
    Holding,
    churn,
    growth_complaints,
    limited_server,
    max_connections,
    table_row,
)

MAX_MORE_BYTES = 8 * MIB  # of 500 MiB; what leaks with each cycle shows in the 5,000 of the slow runs
"""From the middle to the end. A client left open takes 38 KiB, and 20 KiB of the server."""

MANY, MANY_RETRIES = 5000, 1000


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def server() -> Iterator[ProcessServer]:
    with limited_server("--log-level", "info") as server:
        churn("one_shot_checks", server.target, server.pid, 50)  # so that both sides have met before
        churn("sync_clients", server.target, server.pid, 50)
        yield server


@pytest.fixture
def dead_target() -> Iterator[str]:
    """An address where nobody listens, nor will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def check_flat(name: str, held: list[Holding]) -> None:
    print(table_row(name, held))
    assert growth_complaints(held[1], held[2], MAX_MORE_BYTES) == []
    assert held[2].client_descriptors - held[0].client_descriptors <= MAX_MORE_DESCRIPTORS
    assert held[2].server_descriptors - held[0].server_descriptors <= MAX_MORE_DESCRIPTORS


@pytest.mark.parametrize(("address", "cycles"), [("target", 200), slow("target", MANY), slow("health_target", MANY)])
def test_one_shot_health_checks(server: ProcessServer, address: str, cycles: int) -> None:
    held = churn("one_shot_checks", getattr(server, address), server.pid, cycles)
    check_flat(f"health checks, a channel each ({address})", held)


@pytest.mark.parametrize(
    ("kind", "cycles"),
    [
        ("sync_clients", 200),
        ("async_clients", 200),
        *(slow(kind, MANY) for kind in ("sync_clients", "async_clients", "sync_streams")),
    ],
)
def test_clients_that_open_and_close(server: ProcessServer, kind: str, cycles: int) -> None:
    check_flat(kind.replace("_", " "), churn(kind, server.target, server.pid, cycles))


@pytest.mark.parametrize("cycles", [200, slow(MANY)])
def test_http_connections_that_open_and_close(cycles: int) -> None:
    with limited_server("--http-listen", "127.0.0.1:0") as server:
        churn("http_calls", server.http_address, server.pid, 50)
        check_flat("HTTP calls, a connection each", churn("http_calls", server.http_address, server.pid, cycles))


@pytest.mark.parametrize(
    ("kind", "cycles"),
    [("sync_retries", 60), *(slow(kind, MANY_RETRIES) for kind in ("sync_retries", "async_retries"))],
)
def test_retries_against_a_dead_server(server: ProcessServer, dead_target: str, kind: str, cycles: int) -> None:
    check_flat(f"{kind.replace('_', ' ')}, server dead", churn(kind, dead_target, server.pid, cycles))


@pytest.mark.parametrize("runs", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_health_command(server: ProcessServer, runs: int) -> None:
    before = descriptors(server.pid), resident_bytes(server.pid)
    for _ in range(runs):
        command = [sys.executable, "-m", "bilm_client.cli.health_check", "--target", server.target, "--timeout-s", "10"]
        done = subprocess.run(limited(command, LIMIT), capture_output=True, text=True, timeout=240, check=True)
        assert done.stdout.strip() == "SERVING"
    wait_until(lambda: descriptors(server.pid) <= before[0] + MAX_MORE_DESCRIPTORS, "connections are closed")
    assert resident_bytes(server.pid) - before[1] <= MAX_MORE_BYTES


def test_the_measuring_sees_clients_that_are_not_closed(server: ProcessServer) -> None:
    before = descriptors(server.pid)
    held = churn("leak", server.target, server.pid, 100)
    print(table_row("never closed", held))
    leaked = held[2].cycles - held[1].cycles
    assert held[2].client_descriptors - held[1].client_descriptors >= leaked
    assert held[2].server_descriptors - held[1].server_descriptors >= leaked
    complaints = growth_complaints(held[1], held[2], MAX_MORE_BYTES)
    assert [line.partition(":")[0] for line in complaints if "descriptors" in line] == ["client", "server"]
    wait_until(lambda: descriptors(server.pid) <= before + MAX_MORE_DESCRIPTORS, "their process has ended")


def test_more_leaks_than_fit_are_refused_and_do_not_harm_the_server(server: ProcessServer) -> None:
    """The client runs out, not the server: 200 fit neither below its own limit nor below the server's."""
    with pytest.raises(AssertionError, match=r"Unavailable|Too many open files"):
        churn("leak", server.target, server.pid, LIMIT)
    assert churn("one_shot_checks", server.target, server.pid, 5)[-1].cycles == 5


def test_the_server_says_that_few_connections_fit(server: ProcessServer) -> None:
    (warning,) = [line for line in server.lines if "connections fit" in line]
    assert f"ulimit -n is {LIMIT}" in warning
    assert "set it to 1024 or more" in warning
    assert 64 <= max_connections(server) < LIMIT
    assert Path(f"/proc/{server.pid}/limits").read_text().split("Max open files")[1].split()[0] == str(LIMIT)
