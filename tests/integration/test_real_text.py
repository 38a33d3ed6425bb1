"""The model that ships, on real text."""

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from bilm_client import Client
from bilm_client.batch.main import main
from bilm_client.testing.server import ServerProcess
from bilm_model import pretrained
from bilm_model.weights.loading import load

CARD = pretrained.DEFAULT.with_suffix(".md")


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with ServerProcess(model="") as server:
        yield server.target


def test_wikitext_and_korean_pass_through(target: str, corpora: Path, tmp_path: Path) -> None:
    english = (corpora / "wikitext-2" / "test.txt").read_text(encoding="utf-8").splitlines()
    treebank = (corpora / "UD_Korean-GSD" / "ko_gsd-ud-test.conllu").read_text(encoding="utf-8")
    korean = re.findall(r"^# text = (.*)$", treebank, flags=re.MULTILINE)
    lines = [line.strip() for line in (*english[:150], *korean[:150]) if line.strip()]
    text, output = tmp_path / "text", tmp_path / "vectors.hdf5"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main([str(text), str(output), "--target", target, "--layers", "top", "--raw"]) == 0
    with h5py.File(output) as file:
        assert set(file) == {*map(str, range(len(lines))), "sentence_to_index"}
        for i in range(len(lines)):
            vectors = file[str(i)][()]
            assert vectors.shape[1] == 256
            assert np.isfinite(vectors).all()


def test_context_tells_two_meanings_apart(target: str) -> None:
    sentences = [
        "He wrote the play in three weeks .",
        "The play was performed at a theatre in London .",
        "He continued to play for the club until 1998 .",
        "She could not play in the final of the cup .",
    ]
    with Client(target) as client:
        found = client.embed([sentence.split() for sentence in sentences])
    noun, noun_too, verb, verb_too = (e.vectors[2, e.tokens.index("play")] for e in found)
    context_free = [e.vectors[0, e.tokens.index("play")] for e in found]
    assert all(np.array_equal(context_free[0], other) for other in context_free)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert min(cosine(noun, noun_too), cosine(verb, verb_too)) > max(cosine(noun, verb), cosine(noun_too, verb_too))


def test_a_typo_stays_near_its_word(target: str) -> None:
    with Client(target) as client:
        right, wrong, other = client.embed([["government"], ["goverment"], ["guitarist"]], layers="all")

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b))

    assert distance(right.vectors[0], wrong.vectors[0]) < 0.5 * distance(right.vectors[0], other.vectors[0])


def test_the_card_belongs_to_the_file() -> None:
    card = CARD.read_text(encoding="utf-8")
    model = load("")
    assert f"version `{model.version}`" in card
    assert f"{model.bilm.parameter_count:,} parameters" in card
    assert pretrained.DEFAULT.stat().st_size < 15 * 2**20
