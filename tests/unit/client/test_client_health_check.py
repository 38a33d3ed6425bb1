"""`bilm-health`."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from bilm_client.cli.health_check import main
from grpc_health.v1 import health_pb2

from tests.support.processes import started

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.scripted import Scripted

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_exit_codes(scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", scripted.target]) == 0
    assert main(["--target", scripted.target, "--service", "nobody"]) == 1
    scripted.set_health(NOT_SERVING)
    assert main(["--target", scripted.target]) == 1
    assert main(["--target", f"unix:{tmp_path}/nobody"]) == 2
    printed = capsys.readouterr()
    assert printed.out.split() == ["SERVING", "SERVICE_UNKNOWN", "NOT_SERVING"]
    assert printed.err.startswith("UNREACHABLE")


def test_the_target_comes_from_the_environment(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILM_TARGET", scripted.target)
    assert main([]) == 0


def test_a_model_has_a_health_of_its_own(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.set_health(NOT_SERVING, "model:de")
    assert main(["--target", scripted.target, "--model", "de"]) == 1
    assert main(["--target", scripted.target, "--model", "fr"]) == 1
    assert capsys.readouterr().out.split() == ["NOT_SERVING", "SERVICE_UNKNOWN"]
    for flags in (["--model", ""], ["--model", "de", "--service", "liveness"]):
        with pytest.raises(SystemExit):
            main(["--target", scripted.target, *flags])


@pytest.mark.parametrize("text", ["0", "-1", "inf", "x"])
def test_a_bad_timeout(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--timeout-s", text])
    assert "--timeout-s" in capsys.readouterr().err


def test_watch_tells_each_change_until_interrupted(scripted: Scripted) -> None:
    command = [sys.executable, "-m", "bilm_client.cli.health_check", "--watch", "--target", scripted.target]
    with started(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split()[1] == "SERVING"
        scripted.set_health(NOT_SERVING)
        assert process.stdout.readline().split()[1] == "NOT_SERVING"
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 1


def test_watch_ends_when_nobody_reads_it(scripted: Scripted) -> None:
    command = [sys.executable, "-m", "bilm_client.cli.health_check", "--watch", "--target", scripted.target]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().split()[1] == "SERVING"
        process.stdout.close()
        scripted.set_health(NOT_SERVING)
        assert process.wait(60) == 1
        assert process.stderr.read() == ""


def test_no_numpy_in_a_probe() -> None:
    code = "import sys, bilm_client.cli.health_check; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
