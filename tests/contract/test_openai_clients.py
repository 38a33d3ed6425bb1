"""Clients of OpenAI's API, and curl, against a real server.

Those for Python have an environment of their own, that for JavaScript a folder in it: `make test-slow` sets them up.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bilm_client import Client

from tests.contract.openai_clients import TEXTS
from tests.support.processes import free_port
from tests.support.server_processes import ProcessServer

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-openai" / "bin" / "python"
NPM = ROOT / ".venv-openai" / "npm"
MODEL = "random-tiny"
TOKEN = "a-token-of-sixteen"
ERRORS = {
    "empty": ["BadRequestError", "POOLING_EMPTY", "input[1]: an empty string has no vector"],
    "integers": ["BadRequestError", "MALFORMED_REQUEST", "check_embedding_ctx_length=False"],
    "model": ["NotFoundError", "MODEL_NOT_FOUND", f"no such model is served here (expected one of {MODEL})"],
    "dimensions": ["BadRequestError", "MALFORMED_REQUEST", "dimensions: this model's vectors have 16"],
    "key": ["AuthenticationError", "UNAUTHENTICATED", "the token isn't known"],
}


@dataclass(frozen=True)
class Served:
    """A server that needs a token.

    Attributes:
        target: of gRPC.
        url: of HTTP.
    """

    target: str
    url: str

    def embed(self, **options: Any) -> list[list[float]]:
        """Return the vectors of `Embed`."""
        with Client(self.target, token=TOKEN) as client:
            return [each.vectors.tolist() for each in client.embed(list(TEXTS), **options)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"team-a {TOKEN}\n")
    tokens.chmod(0o600)
    address = f"127.0.0.1:{free_port()}"
    with ProcessServer("--http-listen", address, "--token-file", str(tokens)) as server:
        yield Served(server.target, f"http://{address}/v1")


def said_by(client: str, served: Served) -> Any:
    """Return what a client says in its own environment."""
    if not PYTHON.exists():
        pytest.skip("needs the clients' environment: make .venv-openai/.installed")
    script = ROOT / "tests" / "contract" / "openai_clients.py"
    command = [str(PYTHON), str(script), client, served.url, TOKEN, MODEL]
    quiet = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "False"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=quiet)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def said_by_node(served: Served) -> Any:
    """Return what the client for JavaScript says."""
    node = shutil.which("node")
    if node is None or not (NPM / "node_modules" / "openai").exists():
        pytest.skip("needs node, npm and the clients' environment: make .venv-openai/.installed")
    script = (ROOT / "tests" / "contract" / "openai_client.mjs").read_text(encoding="utf-8")
    command = [node, "--input-type=module", "-", served.url, TOKEN, MODEL]
    done = subprocess.run(command, input=script, cwd=NPM, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_bits(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    """Compare numbers that float32 holds exactly, or that are the shortest to read back as the same float32."""
    assert np.array_equal(np.array(found, np.float32), np.array(expected, np.float32))


def check_errors(found: dict[str, list[str]], names: Sequence[str] = tuple(ERRORS)) -> None:
    assert found.keys() == set(names)
    for name in names:
        kind, code, text = ERRORS[name]
        assert found[name][:2] == [kind, code]
        assert text in found[name][2]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["Python", "JavaScript"])
def test_openai(served: Served, language: str) -> None:
    said = said_by("openai", served) if language == "Python" else said_by_node(served)
    expected = served.embed(layers="top", pool="mean")
    assert said["default"] == expected  # base64, which is what these clients ask for
    if "base64" in said:
        packed = [np.frombuffer(base64.b64decode(data), "<f4").tolist() for data in said["base64"]]
        assert packed == expected
    check_bits(said["float"], expected)
    check_bits(said["average"], served.embed(layers="average", pool="max"))
    assert (said["models"], said["model"], said["tokens"]) == ([MODEL], MODEL, 11)
    check_errors(said["errors"])


@pytest.mark.slow
@pytest.mark.parametrize("client", ["langchain", "haystack", "llama-index"])
def test_frameworks(served: Served, client: str) -> None:
    said = said_by(client, served)
    expected = served.embed(layers="top", pool="mean")
    check_bits(said["default"], expected)
    check_bits([said["query"]], expected[:1])
    if "errors" in said:
        check_errors(said["errors"], ["empty"])


@pytest.mark.slow
def test_curl(served: Served, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    body = tmp_path / "body.json"
    known = ("-H", f"authorization: Bearer {TOKEN}")

    def run(path: str, *flags: str) -> tuple[int, bytes]:
        command = [curl, "-sS", "--noproxy", "*", "-o", str(tmp_path / "out"), "-w", "%{http_code}", *flags]
        done = subprocess.run([*command, f"{served.url}{path}"], capture_output=True, timeout=60, check=True)
        return int(done.stdout), (tmp_path / "out").read_bytes()

    def post(path: str, asked: object, *flags: str) -> tuple[int, bytes]:
        body.write_text(json.dumps(asked))
        return run(path, "-H", "content-type: application/json", "--data-binary", f"@{body}", *flags)

    assert run("/models")[0] == 401
    assert run("/models", *known)[0] == 200
    status, answer = post("/embeddings", {"input": list(TEXTS)}, *known)
    assert status == 200
    check_bits([item["embedding"] for item in json.loads(answer)["data"]], served.embed(layers="top", pool="mean"))
    asked = {"sentences": [{"text": text} for text in TEXTS], "options": {"layers": "top", "pooling": "mean"}}
    status, answer = post("/embed", asked, *known, "-H", "accept: application/octet-stream")
    assert status == 200
    data = answer[4 + int.from_bytes(answer[:4], "little") :]
    check_bits(np.frombuffer(data, "<f4").reshape(len(TEXTS), -1).tolist(), served.embed(layers="top", pool="mean"))
    assert post("/embeddings", {"input": list(TEXTS)}, *known, "-H", "host: evil.example")[0] == 421
    assert run("/embeddings", *known, "-d", "input=a")[0] == 415  # curl's own type of a form
    assert post("/embeddings", {"input": "a" * 5_000_000}, *known)[0] == 413
