"""The model that ships, on real text."""

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from bilm_client import Client
from bilm_client.batch.main import main
from bilm_model import pretrained
from bilm_model.weights.loading import load

from tests.support.server_processes import ProcessServer

CARD = pretrained.DEFAULT.with_suffix(".md")


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with ProcessServer("--model", "") as server:
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


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("word", "one_meaning", "another"),
    [
        (
            "play",
            ("He wrote the play in three weeks .", "Critics praised the play for its humour ."),
            ("He continued to play for the club until 1998 .", "She could not play in the final of the cup ."),
        ),
        (
            "bank",
            ("Trees grow on the western bank of the river .", "A village stood on the southern bank of the lake ."),
            ("The bank lent the company two million dollars .", "The bank closed its office after the war ."),
        ),
    ],
)
def test_context_tells_meanings_apart(
    target: str, word: str, one_meaning: tuple[str, str], another: tuple[str, str]
) -> None:
    with Client(target) as client:
        found = client.embed([sentence.split() for sentence in (*one_meaning, *another)])
    context_free, *_, top = (np.stack([e.vectors[k, e.tokens.index(word)] for e in found]) for k in range(3))
    assert all(np.array_equal(context_free[0], other) for other in context_free)
    same = min(cosine(top[0], top[1]), cosine(top[2], top[3]))
    assert same > 0.05 + max(cosine(top[i], top[j]) for i in (0, 1) for j in (2, 3))


@pytest.mark.parametrize(
    ("right", "wrong", "other"),
    [("season", "seasson", "river"), ("performed", "perfomed", "mountain"), ("patients", "patietns", "copies")],
)
def test_a_typo_stays_nearer_than_another_word(target: str, right: str, wrong: str, other: str) -> None:
    with Client(target) as client:
        word, typo, unrelated = (e.vectors[0, 0] for e in client.embed([[right], [wrong], [other]]))
    assert np.linalg.norm(word - typo) < 0.8 * np.linalg.norm(word - unrelated)


def test_the_card_belongs_to_the_file() -> None:
    card = CARD.read_text(encoding="utf-8")
    model = load("")
    assert f"version `{model.version}`" in card
    assert f"{model.bilm.parameter_count:,} parameters" in card
    assert pretrained.DEFAULT.stat().st_size < 15 * 2**20
