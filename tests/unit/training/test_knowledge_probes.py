import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bilm_model.bilm import random_bilm
from bilm_model.characters import character_ids, with_boundaries
from bilm_model.config import SIZES
from bilm_model.errors import ModelError
from bilm_training.errors import CorpusError
from bilm_training.evaluation.knowledge.linear import WORDS_C, LinearProbe, fit
from bilm_training.evaluation.knowledge.neighbours import Neighbour, Query, WordNeighbours
from bilm_training.evaluation.knowledge.probes import probe
from bilm_training.evaluation.knowledge.report import Knowledge, Neighbourhood
from bilm_training.evaluation.knowledge.scores import ProbeScore, TreebankReport
from bilm_training.evaluation.knowledge.vectors import SentenceEmbedder

# As caches hold so many MiB, and are searched, the cells of the tiniest model would make them slow
BILM = random_bilm(replace(SIZES["tiny"], cell_dim=256, projection_dim=32), seed=3)
SCORES = tuple(ProbeScore(layer, accuracy, accuracy - 0.02, True) for layer, accuracy in enumerate((0.8, 0.9, 0.88)))
REPORT = TreebankReport(
    name="UD_Tiny",
    train_tokens=12345,
    test_tokens=2000,
    typos=150,
    tags=("NOUN", "VERB"),
    seed=1,
    model=SCORES,
    random=tuple(replace(score, accuracy=score.accuracy - 0.2) for score in SCORES),
    word_identity=ProbeScore(None, 0.85, 0.79, False),
)


def test_a_probe_reads_what_is_linear_in_vectors_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(1)
    tags = np.array(["NOUN", "VERB", "ADJ"])[rng.integers(3, size=3000)]
    noise = rng.normal(size=(3000, 8)).astype(np.float32)
    readable = noise + 10 * (tags[:, None] == np.array(["NOUN", "VERB", "ADJ"] * 2 + ["VERB"] * 2)).astype(np.float32)
    fit, test = slice(2000), slice(2000, None)
    assert LinearProbe.on_vectors(readable[fit], tags[fit]).accuracy(readable[test], tags[test]) > 0.99
    assert LinearProbe.on_vectors(noise[fit], tags[fit]).accuracy(noise[test], tags[test]) < 0.45


def test_word_identity_knows_each_words_most_frequent_tag_and_guesses_the_rest() -> None:
    words = ["dog", "dog", "run", "run", "run"] * 40
    tags = np.array(["NOUN", "NOUN", "VERB", "VERB", "NOUN"] * 40)
    fitted = LinearProbe.on_words(words, tags)
    assert fitted.accuracy(["dog", "run"], np.array(["NOUN", "VERB"])) == 1
    assert fitted.accuracy(["dgo", "unheard-of"], np.array(["NOUN", "NOUN"])) == 1


def test_counting_equal_rows_once_changes_nothing() -> None:
    words, tags = ["a", "b", "b", "b", "c"] * 9, np.array(["X", "X", "Y", "Y", "Y"] * 9)
    fitted = LinearProbe.on_words(words, tags, tolerance=1e-7)
    one_hot = fitted.features.transform(np.array(words, dtype=object).reshape(-1, 1))
    one_by_one, _ = fit(WORDS_C, one_hot, tags, tolerance=1e-7)
    np.testing.assert_allclose(fitted.regression.coef_, one_by_one.coef_, atol=2e-3)


def test_a_probe_that_stops_early_says_so() -> None:
    words, tags = ["a", "b", "c"] * 5, np.array(["X", "Y", "Z"] * 5)
    assert LinearProbe.on_words(words, tags).converged
    assert not LinearProbe.on_words(words, tags, max_iterations=1).converged


def test_vectors_are_the_reference_networks() -> None:
    sentences = [("one",), ("the", "cat", "sat"), ("고양이", ".")]
    found = SentenceEmbedder(BILM, "cpu").all(sentences, "test")
    read = [with_boundaries(words) for words in sentences]
    ids = torch.from_numpy(np.concatenate([character_ids(words) for words in read])).long()
    layers, _ = BILM(ids, [len(words) for words in read])
    inside = [n for n, token in enumerate(t for words in read for t in words) if token not in ("<S>", "</S>")]
    np.testing.assert_allclose(found, layers[:, inside].numpy(), atol=1e-5)


def test_a_biLM_in_training_is_left_as_it_is() -> None:  # noqa: N802
    bilm = random_bilm(SIZES["tiny"]).requires_grad_(True).train()
    SentenceEmbedder(bilm, "cpu").all([("a", "b")], "test")
    assert bilm.training
    assert all(parameter.requires_grad for parameter in bilm.parameters())


def write_treebank(folder: Path) -> Path:
    """The tag of "is" depends on the word before it; that of other words on how they begin."""
    rng = np.random.default_rng(5)
    for part, n_sentences in ("train", 150), ("test", 60):
        rows = []
        for _ in range(n_sentences):
            end = "".join("aeiou"[n] for n in rng.integers(5, size=4))
            first = [("kk" + end, "NOUN"), ("is", "AUX")] if rng.integers(2) else [("zz" + end, "ADJ"), ("is", "VERB")]
            for number, (word, tag) in enumerate([*first, (".", "PUNCT")], start=1):
                rows.append("\t".join([str(number), word, "_", tag, *"______"]))
            rows.append("")
        (folder / f"xx_made-ud-{part}.conllu").write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_a_treebank_is_probed_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_treebank(tmp_path)
    report = probe(BILM, folder, seed=2, device="cpu")
    assert (report.name, report.seed) == (tmp_path.name, 2)
    assert (report.train_tokens, report.test_tokens, report.typos) == (450, 180, 12)
    assert report.tags == ("ADJ", "AUX", "NOUN", "PUNCT", "VERB")
    assert [score.layer for score in report.model] == [score.layer for score in report.random] == [0, 1, 2]
    token, first, _ = report.model
    # Spelling tells everything but the tag of "is", and only context tells that
    assert 0.75 < token.accuracy < 0.9
    assert first.accuracy > 0.95
    # Words alone: full stops and half of "is"; nearly all of the words that begin sentences are new
    assert 0.5 < report.word_identity.accuracy < 0.75
    assert report.word_identity.accuracy_with_typos < report.word_identity.accuracy
    assert report.model != report.random
    assert report == probe(BILM, folder, seed=2, device="cpu")
    output = capsys.readouterr()
    assert not output.out
    assert "model, probes" in output.err


def test_no_typos_cost_nothing(tmp_path: Path) -> None:
    report = probe(BILM, write_treebank(tmp_path), typo_share=0, max_train_tokens=200, device="cpu")
    assert report.typos == 0
    assert report.train_tokens == 198
    assert all(score.loss == 0 for score in (*report.model, *report.random, report.word_identity))


def test_there_must_be_tags_to_tell_apart(tmp_path: Path) -> None:
    for part in "train", "test":
        (tmp_path / f"xx-ud-{part}.conllu").write_text("\t".join(["1", "a", "_", "X", *"______"]))
    with pytest.raises(CorpusError, match="have no two tags"):
        probe(BILM, tmp_path, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("treebank", ["UD_English-EWT", "UD_Korean-GSD"])
def test_real_treebanks_can_be_probed(corpora: Path, tmp_path: Path, treebank: str) -> None:
    for part, n_sentences in ("train", 200), ("test", 100):
        (path,) = (corpora / treebank).glob(f"*-ud-{part}.conllu")
        sentences = path.read_text(encoding="utf-8").split("\n\n")[:n_sentences]
        (tmp_path / path.name).write_text("\n\n".join(sentences), encoding="utf-8")
    report = probe(BILM, tmp_path, device="cpu")
    assert report.train_tokens > report.test_tokens > 1000
    assert 0.05 < report.typos / report.test_tokens < 0.1  # a tenth of the words that have letters
    for score in (*report.model, *report.random, report.word_identity):
        assert 0.3 < score.accuracy < 0.95
        assert abs(score.loss) < 10  # per cent of the words have a typo
    assert report.word_identity.loss > 0


def test_knowledge_survives_json() -> None:
    query = Query("a **bank** b", (Neighbour(0.5, "c **bank**"),))
    words = (WordNeighbours("bank", 7, (query,)), WordNeighbours("rare", 0, ()))
    knowledge = Knowledge((REPORT,), (Neighbourhood("test.txt", 1, words),))
    assert Knowledge.from_dict(json.loads(json.dumps(knowledge.to_dict()))) == knowledge
    content = knowledge.to_dict()
    del content["treebanks"][0]["seed"]
    with pytest.raises(ModelError, match=r"treebanks\.0\.seed: Field required"):
        Knowledge.from_dict(content)


def test_markdown_says_what_was_found() -> None:
    words = (WordNeighbours("bank", 7, (Query("a **bank** b", (Neighbour(0.5, "c **bank**"),)),)),)
    text = Knowledge((REPORT,), (Neighbourhood("test.txt", 1, words),)).markdown()
    for line in (
        "| layer 1 | 90.0 | 88.0 | 2.0 |",
        "| random biLM, layer 1 | 70.0 | 88.0 | -18.0 |",
        "| word identity (probe not converged) | 85.0 | 79.0 | 6.0 |",
        "- Best is layer 1, 20.0 points above the random biLM's best. Layer 1 knows more than layer 2: 90.0 and 88.0.",
        "- Typos cost layer 1 2.0 points, word identity 6.0.",
        "- bank, 7 occurrences",
        "    - 0.50 c **bank**",
    ):
        assert line in text.split("\n")
    reverse = replace(REPORT, model=(SCORES[0], SCORES[2], SCORES[1]))
    assert "Layer 1 doesn't know more than layer 2: 88.0 and 90.0." in Knowledge((reverse,)).markdown()
    worse = replace(REPORT, model=REPORT.random, random=REPORT.model)
    assert "Best is layer 1, 20.0 points below the random biLM's best." in Knowledge((worse,)).markdown()
