"""`bilm-serve --check-config`."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.options import EngineOptions
from bilm_model.weights.header import inspect
from bilm_server.checking import MemorySum, memory_sum
from bilm_server.config_sources import load_config
from bilm_server.main import main
from bilm_server.preflight import plan_serving

MIB = 2**20
CPU = torch.device("cpu")


def test_a_good_configuration_is_shown_and_opens_no_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        flags = ["--listen", address, "--metrics-listen", address, "--health-listen", f"unix:{tmp_path}/s"]
        assert main(["--check-config", "--test-log", str(tmp_path / "log"), *flags]) == 0
    shown = capsys.readouterr()
    model, *lines = shown.out.splitlines()
    assert model == "model wikitext2-mini: 3 layers of 256 numbers, 3,000,784 parameters"
    assert any(line.endswith(" MiB  sum") for line in lines)
    assert any("limit (control group or machine)" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_wrong_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tokens := tmp_path / "tokens").write_text("team-a short\n")
    (certificate := tmp_path / "certificate").write_text("none\n")
    flags = {
        "--model": "/nowhere/model.safetensors",
        "--device": "cuda:77",
        "--tokenizer-language": "xx",
        "--token-file": str(tokens),
        "--tls-cert": str(certificate),
        "--tls-key": str(certificate),
        "--listen": "unix:/nowhere/s",
        "--test-log": "/nowhere/log",
        "--max-connections": "2000000000",
    }
    assert main(["--check-config", *(part for flag in flags.items() for part in flag)]) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert all(line.startswith("bilm-serve: ") for line in lines)
    for part in (
        "/nowhere/model.safetensors: no such file", "cuda:77", "tokenizer_language: ", f"{tokens}: line 1: ",
        f"{certificate}, {certificate}: ", "listen: /nowhere: no such folder", "test_log: /nowhere: no such folder",
        "max_connections: ",
    ):  # fmt: skip
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 8


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/nowhere")], ids=["a file", "a symlink"])
@pytest.mark.parametrize("flag", ["--listen", "--health-listen"])
def test_a_unix_socket_where_something_else_is(
    flag: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(place := tmp_path / "s")
    assert main(["--check-config", flag, f"unix:{place}"]) == 2
    assert capsys.readouterr().err.count(f"{place}: exists and isn't a socket") == 1


def test_a_unix_socket_whose_lock_cannot_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lock := tmp_path / "s.lock").mkdir()
    assert main(["--check-config", "--listen", f"unix:{tmp_path}/s"]) == 2
    assert f"listen: {lock}: exists and isn't a regular file" in capsys.readouterr().err


def test_the_socket_of_a_server_that_runs_is_no_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as running:
        running.bind(str(tmp_path / "s"))
        running.listen()
        (tmp_path / "s.lock").touch()
        assert main(["--check-config", "--listen", f"unix:{tmp_path}/s"]) == 0


def test_the_engines_memory_is_what_the_engine_allocates() -> None:
    options = EngineOptions(max_tokens=1000)
    memory = options.resolved(CPU).memory(SIZES["tiny"], CPU)
    allocated = sum(tensor.nbytes for tensor in (memory.vectors, memory.outputs, memory.h, memory.c))
    assert options.memory_bytes(SIZES["tiny"], CPU) == allocated


def the_sum(flags: list[str], n_connections: int = 100, device: torch.device = CPU) -> MemorySum:
    config = load_config(flags)
    return memory_sum(config, [*plan_serving(config).models.values()], n_connections, device)


def test_the_sum_grows_with_what_is_configured() -> None:
    assert inspect("random:small").parameter_count == random_bilm(SIZES["small"]).parameter_count

    def total(*flags: str, n_connections: int = 100) -> int:
        return the_sum(["--model", "random:small", *flags], n_connections).total

    plain = total()
    assert total("--input-cache-mib", "0") == plain - 128 * MIB
    assert total("--max-waiting-mib", "513") == plain + 2 * MIB
    assert total("--max-stream-mib", "1025") == plain + 2 * MIB
    assert total(n_connections=101) == plain + 20 * 1024
    per_token = 4 * 5 * 128  # 3 layers of 256 numbers
    assert total("--max-tokens-in-flight", "65537") == plain + per_token


def test_a_gpu_takes_pinned_memory() -> None:
    parts = [
        dict(the_sum(["--model", "random:small"], device=device).parts) for device in (CPU, torch.device("cuda:0"))
    ]
    assert parts[1]["results on their way from cuda:0"] == 1152 * MIB
    assert not any("on their way" in name for name in parts[0])


def test_a_sum_above_the_limit_is_a_warning() -> None:
    assert not any("warning" in line for line in MemorySum((("a", MIB),), MIB).lines())
    assert any("warning" in line for line in MemorySum((("a", MIB), ("b", 1)), MIB).lines())
