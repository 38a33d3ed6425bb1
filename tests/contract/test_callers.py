"""Callers that aren't this environment's Python: another language, and the oldest libraries we support."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import google.rpc.status_pb2
import numpy as np
import pytest
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_client import Client

from tests.support.server_processes import ProcessServer

ROOT = Path(__file__).parents[2]
PROTO_INCLUDES = [str(ROOT / "proto"), str(Path(google.rpc.status_pb2.__file__).parents[2])]


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with ProcessServer() as server:
        yield server.target


def _install(command: list[str], **environment: str) -> None:
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300, check=False
    )
    if found.returncode:
        pytest.skip(f"{command[0]} could not install what the test needs: {found.stderr.strip().splitlines()[-1:]}")


@pytest.mark.slow
def test_javascript_with_nothing_but_the_proto_file(target: str, tmp_path: Path) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    packages = ["@grpc/grpc-js@1.14", "@grpc/proto-loader@0.8"]
    _install(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), *packages])
    found = subprocess.run(
        ["node", str(ROOT / "tests" / "contract" / "embed.js"), target, *PROTO_INCLUDES],
        capture_output=True,
        text=True,
        env={**os.environ, "NODE_PATH": str(tmp_path / "node_modules")},
        timeout=240,
        check=True,
    )
    said = json.loads(found.stdout)
    assert (said["name"], said["width"], said["id"]) == ("random-tiny", 16, 7)
    assert (said["tokens"], said["shape"]) == (["héllo", "wörld"], [2, 16])
    assert (said["error"], said["refused"]) == (3, 3)  # INVALID_ARGUMENT, of a sentence and of a call
    assert said["streamed"] == said["vectors"]
    with Client(target) as client:
        (expected,) = client.embed([["héllo", "wörld"]], layers="top")
    assert np.array_equal(np.array(said["vectors"], np.float32).reshape(2, 16), expected.vectors)


def _lowest_versions() -> list[str]:
    """The floor of each dependency of the light client, as requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [re.sub(r"^([a-z-]+)>=([0-9.]+).*$", r"\1==\2", line) for line in project["dependencies"]]


def test_the_floors_are_what_the_generated_code_asks_for() -> None:
    versions = dict(line.split("==") for line in _lowest_versions())
    generated = Path(embed_pb2_grpc.__file__).read_text(encoding="utf-8")
    assert f"GRPC_GENERATED_VERSION = '{versions['grpcio']}'" in generated
    runtime = re.search(r"PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+),", Path(embed_pb2.__file__).read_text(encoding="utf-8"))
    assert runtime is not None
    assert ".".join(runtime.groups()) == versions["protobuf"]


@pytest.mark.slow
def test_the_oldest_libraries_that_we_support(target: str, tmp_path: Path) -> None:
    requirements = _lowest_versions()
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", line) for line in requirements)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    python = str(tmp_path / "bin" / "python")
    _install([python, "-m", "pip", "install", "--quiet", *requirements])
    program = f"""
import sys
from bilm_client import Client
with Client({target!r}) as client:
    (unary,) = client.embed(["Hello, world!"])
    (streamed,) = client.embed_stream([["Hello", ",", "world", "!"]])
    assert (unary.vectors == streamed.vectors).all()
    assert client.health() == "SERVING"
    (error,) = client.embed([[""]], on_error="return")
    assert error.reason == "TOKEN_EMPTY", error
import grpc, google.protobuf
print(grpc.__version__, google.protobuf.__version__)
"""
    found = subprocess.run(
        [python, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("system", "proto", "client"))},
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    versions = dict(line.split("==") for line in requirements)
    assert found.stdout.split() == [versions["grpcio"], versions["protobuf"]]
