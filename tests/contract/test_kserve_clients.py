"""The clients of Triton and KServe against a real server.

They have an environment of their own, as they need another protobuf and each brings the protocol's messages, of which a
process may have one: `make test-slow` sets it up.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bilm_client import Client, ScalarMix

from tests.contract.kserve_clients import TEXTS, TOKENS
from tests.support.server_processes import ProcessServer

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-kserve" / "bin" / "python"
MODEL = "random-tiny"
REFUSED = {
    "parameter": ["StatusCode.INVALID_ARGUMENT", "layers: unsupported value 'last'"],
    "model": ["StatusCode.NOT_FOUND", f"no such model is served here (expected one of {MODEL})"],
    "output": ["StatusCode.INVALID_ARGUMENT", "outputs: unknown name 'OUTPUT0'"],
    "batch": ["StatusCode.INVALID_ARGUMENT", "sentences: found 0"],
}


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with ProcessServer() as server:
        yield server.target


@pytest.mark.slow
@pytest.mark.parametrize("client_name", ["triton", "kserve"])
def test_what_they_get_is_what_embed_returns(client_name: str, target: str, tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("needs the clients' environment: make .venv-kserve/.installed")
    file = tmp_path / "found.npz"
    script = ROOT / "tests" / "contract" / "kserve_clients.py"
    done = subprocess.run(
        [PYTHON, script, client_name, target, MODEL, file], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    with np.load(file) as found:
        _compare(dict(found), target)
    assert (said["ready"], said["other_ready"], said["id"]) == ([True, True, True], False, "r-1")
    assert said["dtypes"] == ["float32", "float16"]
    with Client(target) as client:
        assert said["tokens"] == [token for each in client.embed(TEXTS) for token in each.tokens]
    assert {name: code for name, (code, _) in said["errors"].items()} == {
        name: code for name, (code, _) in REFUSED.items()
    }
    assert all(message.startswith(REFUSED[name][1]) for name, (_, message) in said["errors"].items())
    if client_name == "triton":
        assert (said["server"], said["model"], said["empty"]) == ("bilm-serve", MODEL, [0, 3, 16])


def _compare(found: dict[str, Any], target: str) -> None:
    with Client(target) as client:
        ragged = np.concatenate([each.vectors.swapaxes(0, 1) for each in client.embed(TOKENS)])
        pooled = client.embed(TEXTS, layers="top", pool="mean", dtype="float16", l2_normalize=True)
        mixed = client.embed(TEXTS, layers="mix", mix=ScalarMix([1, 2, 3]))
    assert np.array_equal(found["ragged"], ragged)
    assert np.array_equal(found.get("typed", ragged), ragged)
    assert np.array_equal(found["pooled"], np.stack([each.vectors for each in pooled]))
    assert np.array_equal(found["mixed"], np.concatenate([each.vectors for each in mixed]))
    assert found["lengths"].tolist() == list(map(len, TOKENS))
