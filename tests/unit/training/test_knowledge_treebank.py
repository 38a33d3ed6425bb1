from pathlib import Path

import pytest
from bilm_training.errors import CorpusError
from bilm_training.evaluation.knowledge.treebank import TaggedSentence, read_conllu, read_part, sample


def line(number: str, form: str, tag: str) -> str:
    return "\t".join((number, form, "_", tag, "_", "_", "_", "_", "_", "_"))


DON_T = [
    "# text = I don't \u2028know",
    line("1", "I", "PRON"),
    line("2-3", "don't", "_"),
    line("2", "do", "AUX"),
    line("3", "n't", "PART"),
    line("3.1", "elided", "VERB"),
    line("4", "\u2028know", "VERB"),
]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_words_are_read_and_what_stands_for_none_is_skipped(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.conllu"
    path.write_text("\n".join([*DON_T, "", line("1", "새 집", "NOUN")]) + end, encoding="utf-8")
    assert read_conllu(path) == [
        TaggedSentence(("I", "do", "n't", "\u2028know"), ("PRON", "AUX", "PART", "VERB")),
        TaggedSentence(("새 집",), ("NOUN",)),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("2 run VERB", "expected 10 columns parted by tabs, found 1"),
        (line("3", "run", "VERB"), "expected the word number 2, found '3'"),
        (line("x", "run", "VERB"), "expected the word number 2, found 'x'"),
        (line("2", "", "VERB"), "the word is empty"),
        (line("2", "run", "_"), "the word 'run' has no UPOS tag"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: str, message: str) -> None:
    path = tmp_path / "bad.conllu"
    path.write_text("\n".join(["# comment", line("1", "I", "PRON"), bad]), encoding="utf-8")
    with pytest.raises(CorpusError) as caught:
        read_conllu(path)
    assert str(caught.value) == f"{path}:3: {message}"


def test_files_without_sentences_are_refused(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.conllu", tmp_path / "latin.conllu"
    empty.write_text("# nothing\n\n")
    latin.write_bytes(b"\xe9")
    for path, message in (empty, "holds no sentence"), (latin, "utf-8"), (tmp_path / "none", "No such file"):
        with pytest.raises(CorpusError, match=message):
            read_conllu(path)


def test_a_treebank_has_each_part_once(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"expected one file \*-ud-test.conllu, found \[\]"):
        read_part(tmp_path, "test")
    (tmp_path / "xx_tiny-ud-test.conllu").write_text("\n".join(DON_T), encoding="utf-8")
    assert len(read_part(tmp_path, "test")) == 1
    (tmp_path / "yy_tiny-ud-test.conllu").touch()
    with pytest.raises(CorpusError, match="yy_tiny"):
        read_part(tmp_path, "test")


def test_a_sample_has_whole_sentences_from_everywhere() -> None:
    sentences = [TaggedSentence((str(n),) * (1 + n % 3), ("NUM",) * (1 + n % 3)) for n in range(300)]
    assert sample(sentences, None, 1) == sample(sentences, 600, 1) == sentences
    some = sample(sentences, 100, 1)
    assert 97 < sum(len(sentence.words) for sentence in some) <= 100
    assert len(set(some)) == len(some)
    assert set(some) <= set(sentences)
    numbers = [int(sentence.words[0]) for sentence in some]
    assert min(numbers) < 100
    assert max(numbers) > 200
    assert some == sample(sentences, 100, 1) != sample(sentences, 100, 2)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_other_line_ends(tmp_path: Path, end: str) -> None:
    (path := tmp_path / "a.conllu").write_bytes(b"\xef\xbb\xbf" + f"{line('1', 'run', 'VERB')}{end}{end}".encode())
    assert read_conllu(path) == [TaggedSentence(("run",), ("VERB",))]
