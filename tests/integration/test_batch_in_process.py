"""`bilm-embed` without a server: the same files, and runs that go on where others ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bilm_client.batch.journal import Journal
from bilm_local.command import main

from tests.integration.batch_support import (
    REFUSED,
    assert_same,
    datasets,
    embed,
    ended,
    journal_of,
    run_of,
    wait_for_size,
    write,
)
from tests.support.processes import started
from tests.support.servers import serving

MODEL = str(Path(__file__).parents[1] / "data" / "golden" / "tanh-3layers")
COMMAND = "import sys; from bilm_local.command import main; sys.exit(main())"
LIGHT = """
import sys
from bilm_local.command import main
try:
    main(["--help"])
except SystemExit:
    pass
assert not {"torch", "bilm_model"} & set(sys.modules)
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "in.txt", *(f"this is line number {number}, isn't it?" for number in range(300)))


@pytest.mark.parametrize("flags", [(), ("--carry-state",), ("--raw", "--layers", "top", "--pool", "mean")], ids=str)
def test_the_file_is_a_servers_bit_for_bit(tmp_path: Path, text: Path, flags: tuple[str, ...]) -> None:
    own, remote = tmp_path / "own.hdf5", tmp_path / "remote.hdf5"
    assert main([str(text), str(own), "--model", MODEL, "--device", "cpu", *flags]) == 0
    with serving("--model", MODEL) as server:
        assert embed(server.target, text, remote, *flags) == 0
    assert_same(datasets(own), datasets(remote), tolerance=0)
    assert run_of(own) == run_of(remote)
    assert not journal_of(own).exists()


@pytest.mark.parametrize("flags", [(), ("--carry-state",)], ids=["batches", "carried"])
def test_a_killed_run_goes_on_in_process_or_by_a_server(tmp_path: Path, text: Path, flags: tuple[str, ...]) -> None:
    whole, output = tmp_path / "whole.hdf5", tmp_path / "out.hdf5"
    arguments = ["--model", MODEL, "--device", "cpu", "--batch-tokens", "16", *flags]
    assert main([str(text), str(whole), *arguments]) == 0
    command = [sys.executable, "-c", COMMAND, str(text), str(output), *arguments]
    with started(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        wait_for_size(journal_of(output), 20_000, process)
        process.send_signal(signal.SIGKILL)
        assert ended(process)[0] == -signal.SIGKILL
    kept = journal_of(output).read_bytes()
    Journal.reopen(journal_of(output)).close()
    assert main([str(text), str(output), *arguments, "--resume"]) == 0
    assert_same(datasets(output), datasets(whole), tolerance=0)

    output.unlink()
    journal_of(output).write_bytes(kept)
    with serving("--model", MODEL) as server:
        assert embed(server.target, text, output, "--resume", *flags) == 0
    assert_same(datasets(output), datasets(whole), tolerance=0)


def test_the_model_that_ships_needs_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.npz"
    assert main([str(write(tmp_path / "in.txt", "a b")), str(output), "--in-process", "--device", "cpu"]) == 0
    assert datasets(output)["0"].shape == (3, 2, 256)
    assert "1 sentences; 2 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "nothing.safetensors"), "nothing.safetensors"),
        (("--in-process", "--device", "abacus"), "device: expected auto, cpu, cuda or cuda:N"),
        (("--in-process", "--tokenizer-language", "xx"), "xx"),
    ],
    ids=str,
)
def test_a_model_that_cant_be_used_ends_the_run_with_code_2(
    tmp_path: Path, text: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(text), str(tmp_path / "out.hdf5"), *flags]) == REFUSED
    errors = capsys.readouterr().err
    assert errors.startswith("bilm-embed: model: ")
    assert message in errors


def test_the_command_loads_no_torch_for_a_server() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, capture_output=True)
