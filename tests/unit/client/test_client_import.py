"""The client is light: what its import loads, how long it takes, what it keeps open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import bilm_client
from bilm_client import Client

if TYPE_CHECKING:
    from tests.unit.client.conftest import Scripted

IMPORT = """
import sys, time
start = time.process_time()
from bilm_client import AsyncClient, Client, ScalarMix
import bilm_client.testing
print(time.process_time() - start)
heavy = {"torch", "h5py", "pydantic", "bilm_model", "bilm_server", "pytest", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_is_fast_and_loads_nothing_heavy() -> None:
    command = [sys.executable, "-c", IMPORT]
    seconds = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(5)]
    assert min(seconds) < 0.3  # of computing: what else the machine does is no fault of the import's


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
