"""How the fixture's server is waited for, with processes that are no servers."""

import subprocess
import sys
from pathlib import Path

import pytest
from bilm_client.testing.server import ServerStartError, wait_until_serving


def test_a_server_that_exits(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
        with pytest.raises(ServerStartError, match="exited with code 3"):
            wait_until_serving(f"unix:{tmp_path}/s", process, timeout_s=30)


def test_a_server_that_never_serves(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(ServerStartError, match="not ready after"):
            wait_until_serving(f"unix:{tmp_path}/s", process, timeout_s=0.2)
        process.communicate(b"\n")
