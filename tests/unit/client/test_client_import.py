"""The client is light: what its import loads, what it keeps open. `make bench` times the import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import bilm_client
from bilm_client import Client

if TYPE_CHECKING:
    from tests.support.scripted import Scripted

# A child's site packages load what they like at its start, so only what the import adds is looked at.
IMPORT = """
import sys
before = set(sys.modules)
from bilm_client import AsyncClient, Client, ScalarMix
import bilm_client.testing
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
"""
OUR_OWN = {"bilm_api", "bilm_client", "bilm_system"}
GRPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google"}  # grpc imports reflection where it is there
NUMPY = {"numpy", "typing_extensions"}


def test_import_loads_grpc_numpy_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    loaded = {name for name in done.stdout.split() if "cython" not in name}  # what its modules share, by its version
    assert OUR_OWN | {"grpc", "google", "numpy"} <= loaded
    assert loaded <= OUR_OWN | GRPC | NUMPY


def test_every_public_name_exists() -> None:
    assert set(bilm_client.__all__) <= set(dir(bilm_client))
    for name in bilm_client.__all__:
        assert getattr(bilm_client, name) is not None


def test_opening_and_closing_keeps_no_descriptor(scripted: Scripted) -> None:
    def cycle() -> None:
        # Without a pool of its own, every channel would share one connection, and nothing could leak.
        with Client(scripted.target, channel_options=[("grpc.use_local_subchannel_pool", 1)]) as client:
            client.health()
            client.embed("a")

    for _ in range(20):
        cycle()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(200):
        cycle()
    # the server's ends close a moment later than ours
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 10
