"""The published numbers, through a server and `bilm-embed` into a file."""

import json
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.integration.batch_support import SENTENCES, assert_same, datasets, embed, write
from tests.support.servers import LoopServer

TOLERANCE = 1e-5


class Golden:
    def __init__(self, folder: Path) -> None:
        self.sentences: list[list[str]] = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
        with h5py.File(folder / "expected.hdf5") as file:
            self.stateless: list[Any] = [file[f"stateless/{i}"][()] for i in range(len(self.sentences))]
            self.batches: list[list[int]] = json.loads(file["stateful"].attrs["batches"])
            self.stateful = [
                [file[f"stateful/{b}/{j}"][()] for j in range(len(batch))] for b, batch in enumerate(self.batches)
            ]


@pytest.fixture(scope="session")
def vectors(golden: Path) -> Golden:
    return Golden(golden)


def test_a_file_of_lines_can_hold_every_golden_sentence(vectors: Golden) -> None:
    cannot = [i for i, tokens in enumerate(vectors.sentences) if " ".join(tokens).split() != tokens or not tokens]
    assert cannot == []  # so nothing has to be left out below
    assert {len(batch) for batch in vectors.batches} == {3}  # rows, below


def test_stateless(vectors: Golden, golden_server: LoopServer, tmp_path: Path) -> None:
    text, output = write(tmp_path / "in.txt", *vectors.sentences), tmp_path / "out.hdf5"
    assert embed(golden_server.target, text, output) == 0
    expected = {str(i): array for i, array in enumerate(vectors.stateless)}
    assert_same(datasets(output), expected, TOLERANCE)
    with h5py.File(output) as file:
        sentences = json.loads(file[SENTENCES][0])
    assert sentences == {" ".join(tokens): str(i) for i, tokens in enumerate(vectors.sentences)}


@pytest.mark.parametrize("row", range(3))
def test_carried_state_one_run_for_each_row(
    vectors: Golden, golden_server: LoopServer, tmp_path: Path, row: int
) -> None:
    lines = [vectors.sentences[batch[row]] for batch in vectors.batches]
    text, output = write(tmp_path / "in.txt", *lines), tmp_path / "out.hdf5"
    assert embed(golden_server.target, text, output, "--carry-state") == 0
    expected = {str(b): vectors.stateful[b][row] for b in range(len(vectors.batches))}
    assert_same(datasets(output), expected, TOLERANCE)
