"""The whole test part of WikiText-2 through the model that ships, with and without interruptions. Takes minutes."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.integration.batch_support import SENTENCES, embed, embedding, journal_of, wait_for_size
from tests.support.server_processes import ProcessServer

pytestmark = pytest.mark.slow

MIDDLE_BYTES = 200 * 2**20  # of about 750 MB


def shipped(listen: str) -> ProcessServer:
    """Return a server on the model that ships."""
    return ProcessServer("--model", "", listen=listen)


@pytest.fixture(scope="module")
def text(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = (corpora / "wikitext-2" / "test.txt").read_text(encoding="utf-8").split()
    lines = " ".join(words)
    for end in (".", "?", "!"):
        lines = lines.replace(f" {end} ", f" {end}\n")
    path = tmp_path_factory.mktemp("corpus") / "test.txt"
    path.write_text(lines + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def listen() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bilm-") as folder:
        yield f"unix:{folder}/socket"


@pytest.fixture(scope="module")
def uninterrupted(listen: str, text: Path) -> Path:
    output = text.with_name("uninterrupted.hdf5")
    with shipped(listen):
        assert embed(listen, text, output) == 0
    return output


def assert_same_content(found: Path, expected: Path, text: Path) -> None:
    n_lines = len(text.read_text(encoding="utf-8").splitlines())
    with h5py.File(found) as a, h5py.File(expected) as b:
        assert set(a) == set(b) == {*map(str, range(n_lines)), SENTENCES}
        assert a[SENTENCES][0] == b[SENTENCES][0]
        assert max(np.abs(a[str(i)][()] - b[str(i)][()]).max() for i in range(n_lines)) <= 1e-6
    found.unlink()


def test_a_killed_client_resumes(listen: str, text: Path, uninterrupted: Path) -> None:
    output = text.with_name("killed-client.hdf5")
    with shipped(listen):
        with embedding(listen, text, output) as process:
            wait_for_size(journal_of(output), MIDDLE_BYTES, process)
            process.send_signal(signal.SIGKILL)
        assert not output.exists()
        assert embed(listen, text, output, "--resume") == 0
    assert_same_content(output, uninterrupted, text)


@pytest.mark.parametrize("patience_s", ["0", "60"])
def test_a_killed_server_is_started_again(listen: str, text: Path, uninterrupted: Path, patience_s: str) -> None:
    """Without patience the run stops and is resumed; with it, it outlives the restart."""
    output = text.with_name(f"killed-server-{patience_s}.hdf5")
    with shipped(listen) as server, embedding(listen, text, output, "--patience-s", patience_s) as process:
        wait_for_size(journal_of(output), MIDDLE_BYTES, process)
        server.kill()
        if patience_s == "0":
            assert process.wait(120) == 1
        with shipped(listen):
            if patience_s == "0":
                assert embed(listen, text, output, "--resume") == 0
            else:
                assert process.wait(300) == 0
    assert_same_content(output, uninterrupted, text)
