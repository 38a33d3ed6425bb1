from dataclasses import replace
from pathlib import Path

import pytest
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_training.errors import CorpusError
from bilm_training.evaluation.knowledge.neighbours import neighbours, read_sentences

# As caches hold so many MiB, and are searched, the cells of the tiniest model would make them slow
BILM = random_bilm(replace(SIZES["tiny"], cell_dim=256, projection_dim=32), seed=3)
RIVER = [("a", "muddy", "bank", "of", "the", "river", end) for end in ("rose", "was", "lay", "fell")]
MONEY = [("their", "rich", "bank", "lent", "him", "cash", end) for end in ("today", "soon", "again", "twice")]


def test_occurrences_of_a_planted_sense_are_nearest() -> None:
    (found,) = neighbours(BILM, [*RIVER, *MONEY], ["bank"], n_queries=8, device="cpu")
    assert (found.word, found.occurrences, len(found.queries)) == ("bank", 8, 8)
    for query in found.queries:
        sense = "muddy **bank**" if "muddy" in query.snippet else "rich **bank**"
        assert len(query.neighbours) == 3
        assert all(sense in neighbour.snippet for neighbour in query.neighbours)
        cosines = [neighbour.cosine for neighbour in query.neighbours]
        assert cosines == sorted(cosines, reverse=True)
        assert all(-1 <= cosine < 0.999999 for cosine in cosines)
        assert query.snippet not in [neighbour.snippet for neighbour in query.neighbours]


def test_the_token_layer_knows_no_senses() -> None:
    (found,) = neighbours(BILM, [*RIVER, *MONEY], ["bank"], layer=0, n_neighbours=7, device="cpu")
    assert all(neighbour.cosine > 0.999 for query in found.queries for neighbour in query.neighbours)


def test_any_word_may_be_the_nearest() -> None:
    text = [*RIVER, ("a", "muddy", "banc", "of", "the", "river", "rose")]
    (found,) = neighbours(BILM, text, ["bank"], n_queries=1, n_neighbours=8, any_word=True, device="cpu")
    assert found.occurrences == 4
    assert any("**banc**" in neighbour.snippet for neighbour in found.queries[0].neighbours)


def test_neither_the_own_sentence_nor_its_copy_is_a_neighbour() -> None:
    text = [("bank", "by", "bank"), ("bank", "by", "bank"), ("one", "bank")]
    (found,) = neighbours(BILM, text, ["bank"], n_queries=9, device="cpu")
    assert found.occurrences == 3
    assert [[n.snippet for n in query.neighbours] for query in found.queries[:2]] == [["one **bank**"]] * 2
    assert len(found.queries[2].neighbours) == 2


def test_queries_are_spread_and_words_that_do_not_occur_are_told() -> None:
    text = [(f"w{n}", "bank") for n in range(30)]
    bank, rare = neighbours(BILM, text, ["bank", "rare"], n_queries=3, device="cpu")
    assert [query.snippet for query in bank.queries] == ["w5 **bank**", "w15 **bank**", "w25 **bank**"]
    assert (rare.occurrences, rare.queries) == (0, ())
    assert neighbours(BILM, text, ["rare"], device="cpu")[0].queries == ()


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="layer: expected 0 to 2, found 3"):
        neighbours(BILM, RIVER, layer=3, device="cpu")


def test_paragraphs_are_cut_into_sentences(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" \n = Heading . = \n \n One . Two ? \n And three\n", encoding="utf-8")
    assert read_sentences(path) == [("One", "."), ("Two", "?"), ("And", "three")]
    conllu = tmp_path / "text.conllu"
    conllu.write_text("\t".join(["1", "One", "_", "NUM", *"______"]))
    assert read_sentences(conllu) == [("One",)]


def test_a_text_without_sentences_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" = Heading = \n")
    with pytest.raises(CorpusError, match="holds no sentence"):
        read_sentences(path)
    with pytest.raises(CorpusError, match="No such file"):
        read_sentences(tmp_path / "none.txt")
