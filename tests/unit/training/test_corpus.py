import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bilm_model.characters import character_ids
from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams, WindowPair
from bilm_training.data.vocabulary import BOUNDARY, Vocabulary
from bilm_training.errors import CorpusError

from tests.unit.training.training_support import (
    TEXT,
    naive_tokens,
    open_text,
    random_text,
    streams_of,
    vocabulary_of,
    write,
)

# More than one block of 4 KiB, lines longer than one, both kinds of line end, characters of 1 to 4 bytes
LARGE = random_text(150) + "long " * 3000 + "\r\n" + "ab é 한국 🙂\t x\r\n" + random_text(150, seed=1) + "the end"


# ---- vocabulary ------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_ordered_by_frequency_then_alphabet() -> None:
    vocabulary = Vocabulary.of(Counter("bacabda"))
    assert vocabulary.words == ("</S>", "a", "b", "c", "d")
    assert [vocabulary.target(word) for word in ("<S>", "</S>", "a", "d")] == [BOUNDARY, BOUNDARY, 1, 4]


def test_a_bounded_vocabulary_keeps_the_most_frequent_and_has_unk() -> None:
    counts = Counter({"a": 4, "b": 3, "c": 2, "d": 1})
    assert Vocabulary.of(counts, 3).words == ("</S>", "a", "b", "<unk>")
    assert Vocabulary.of(counts, 4).words == ("</S>", "a", "b", "c", "d")
    assert Vocabulary.of(counts + Counter({"<unk>": 9}), 3).words == ("</S>", "a", "b", "<unk>")
    assert Vocabulary.of(counts, 3).target("d") == 3


def test_a_vocabulary_is_read_as_it_was_written() -> None:
    vocabulary = Vocabulary.of(Counter(["é", "한국", "🙂", "<unk>", "don't", '"', "\\", "\ufeff", "#"]))
    assert Vocabulary.from_text(vocabulary.to_text()) == vocabulary


def test_words_are_what_white_space_leaves_of_any_kind(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    Corpus.open(write(tmp_path / "text", "a\u2028b\x85c\xa0d\x1ce\x0bf\x0cg\rh\n"), counts)
    assert sorted(counts) == list("abcdefgh")
    vocabulary = Vocabulary.of(counts)  # no word has anything in it that ends a line
    assert Vocabulary.from_text(vocabulary.to_text()) == vocabulary


def test_an_unknown_word_counts_as_unk_or_is_named(tmp_path: Path) -> None:
    corpus = open_text(tmp_path, "a new\n")
    (window,) = Streams(corpus, Vocabulary(("</S>", "<unk>", "a")), 1, 10).windows()
    assert window.forward.targets.ravel().tolist() == [2, 1, BOUNDARY]
    streams = Streams(corpus, Vocabulary(("</S>", "a")), 1, 10)
    with pytest.raises(CorpusError, match=r"text: the word 'new' is not in the vocabulary, which has no <unk>"):
        streams.check()
    with pytest.raises(CorpusError, match="'new'"):
        list(streams.windows())


@pytest.mark.parametrize("max_counted", [10, 40])
def test_rare_words_are_forgotten_when_there_are_too_many(tmp_path: Path, max_counted: int) -> None:
    """Each frequent word stands in every line, each rare one in one."""
    lines = [f"f0 f1 f2 f3 f4 f4 rare{n} odd{n}" for n in range(2000)]
    counts: Counter[str] = Counter()
    corpus = Corpus.open(write(tmp_path / "text", "\n".join(lines)), counts, max_counted)
    assert len(counts) <= max_counted
    assert [counts[f"f{n}"] for n in range(5)] == [2000] * 4 + [4000]
    assert counts.total() == 8 * len(lines)  # what is forgotten is <unk>
    vocabulary = Vocabulary.of(counts)
    assert "<unk>" in vocabulary.words
    Streams(corpus, vocabulary, 4, 100).check()  # so every word has a class
    assert vocabulary.target("rare7") == vocabulary.classes["<unk>"]


def test_words_are_counted_as_they_stand(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    Corpus.open(write(tmp_path / "text", LARGE), counts)
    assert counts == Counter(LARGE.split())


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a b\nc\n", "<S> a b </S> <S> c </S>"),
        ("a b\nc", "<S> a b </S> <S> c </S>"),
        ("a b\r\nc\r\n", "<S> a b </S> <S> c </S>"),
        ("  a \t b  \n", "<S> a b </S>"),
        ("a\n\n \nb\n", "<S> a </S> <S> </S> <S> </S> <S> b </S>"),
        ("\n\na", "<S> </S> <S> </S> <S> a </S>"),
        ("The the DON'T . ,\n", "<S> The the DON'T . , </S>"),
        ("e\u0301 é\n", "<S> e\u0301 é </S>"),
        ("a <S> b\n", "<S> a <S> b </S>"),
    ],
)
def test_lines_become_tokens(tmp_path: Path, text: str, tokens: str) -> None:
    corpus = open_text(tmp_path, text)
    expected = tokens.split(" ")
    assert corpus.n_tokens == len(expected)
    assert corpus.tokens(0, len(expected)) == expected


def test_any_part_of_a_large_file_is_what_a_naive_reader_finds(tmp_path: Path) -> None:
    corpus = open_text(tmp_path, LARGE)
    expected = naive_tokens(corpus.path)
    assert corpus.n_tokens == len(expected)
    assert corpus.tokens(0, len(expected)) == expected
    draw = random.Random(0)
    for _ in range(300):
        start = draw.randrange(len(expected))
        end = min(len(expected), start + draw.choice([0, 1, 7, 900]))
        assert corpus.tokens(start, end) == expected[start:end]


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    digests = [
        Corpus.open(write(tmp_path / name, text)).digest
        for name, text in (("a", LARGE), ("b", LARGE), ("c", LARGE[:-1] + "e"))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("content", [b"", b"\n \n\t\r\n"])
def test_a_text_without_words_is_none(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CorpusError, match=r"/text: holds no word$"):
        open_text(tmp_path, content)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="none: No such file"):
        Corpus.open(tmp_path / "none")
    with pytest.raises(CorpusError, match=f"{tmp_path.name}: Is a directory$"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("n_lines", [0, 2, 5000])
def test_what_is_not_utf_8_is_named_by_its_line(tmp_path: Path, n_lines: int) -> None:
    good = b"good line\n" * n_lines
    with pytest.raises(CorpusError, match=rf"/text, line {n_lines + 1}: not UTF-8 \(.*, byte {len(good) + 2}\)"):
        open_text(tmp_path, good + b"ba\xffd\nmore\n")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded by what Linux has for it")
def test_a_file_is_not_read_into_memory(tmp_path: Path) -> None:
    """50 MB are gone through and read from with 32 MB more: the whole file, or all of its words, wouldn't fit."""
    path = tmp_path / "large"
    part = random_text(3000).encode()
    with path.open("wb") as file:
        for _ in range(50_000_000 // len(part) + 1):
            file.write(part)
    program = f"""
import resource
from collections import Counter
from pathlib import Path
from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams
from bilm_training.data.vocabulary import Vocabulary

lines = Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
bound = used + 32_000_000
resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
counts = Counter()
corpus = Corpus.open(Path({str(path)!r}), counts)
streams = Streams(corpus, Vocabulary.of(counts), 16, 32)
for _, pair in zip(range(20), streams.windows()):
    assert pair.forward.tokens.shape == (32, 16)
try:
    corpus.path.read_bytes()
except MemoryError:
    print(corpus.n_tokens, len(counts))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    path.unlink()
    assert found.returncode == 0, found.stderr
    n_tokens, n_words = map(int, found.stdout.split())
    assert n_tokens > 5_000_000
    assert n_words == 40


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_streams", "n_steps"), [(1, 10_000), (1, 7), (3, 64), (16, 5), (7, 1)])
def test_windows_are_the_text_and_the_text_reversed(tmp_path: Path, n_streams: int, n_steps: int) -> None:
    corpus = open_text(tmp_path, random_text(60) + "x" * 5000 + "\n" + random_text(60, seed=1))
    streams = streams_of(corpus, n_streams, n_steps)
    pairs = list(streams.windows())
    text = naive_tokens(corpus.path)
    length = (len(text) - 1) // n_streams
    assert streams.n_windows == len(pairs) == -(-length // n_steps)
    assert [pair.position for pair in pairs] == list(range(0, length, n_steps))
    for d, (read, begin) in enumerate(((text, "<S>"), (text[::-1], "</S>"))):
        windows = [pair.directions[d] for pair in pairs]
        tokens = np.concatenate([pair.types[pair.directions[d].tokens] for pair in pairs])
        targets = np.concatenate([window.targets for window in windows])
        counted = np.concatenate([window.counted for window in windows])
        for b in range(n_streams):
            here, follows = (read[b * length + k : b * length + k + length] for k in (0, 1))
            assert (tokens[:, b] == character_ids(here)).all()
            assert targets[:, b].tolist() == [streams.vocabulary.target(token) for token in follows]
            assert counted[:, b].tolist() == [token != begin for token in follows]


@pytest.mark.parametrize(("n_streams", "n_steps"), [(1, 1000), (1, 4), (3, 4), (4, 2), (5, 1), (7, 50)])
def test_each_direction_predicts_every_word_and_end_of_line_once(tmp_path: Path, n_streams: int, n_steps: int) -> None:
    """Also where the text can't be divided by the streams: TEXT has 18 steps."""
    corpus = open_text(tmp_path, TEXT)
    streams = Streams(corpus, vocabulary_of(corpus), n_streams, n_steps, whole=True)
    pairs = list(streams.windows())
    for d in range(2):
        windows = [pair.directions[d] for pair in pairs]
        targets = np.concatenate([window.targets[window.counted] for window in windows])
        predicted = [streams.vocabulary.words[target] for target in targets]
        assert sorted(predicted) == sorted(TEXT.split() + ["</S>"] * TEXT.count("\n"))


def test_a_stream_that_begins_earlier_reads_what_is_there(tmp_path: Path) -> None:
    corpus = open_text(tmp_path, TEXT)  # 18 steps: the fourth stream of five begins two early
    (pair,) = Streams(corpus, vocabulary_of(corpus), 4, 100, whole=True).windows()
    text = naive_tokens(corpus.path)
    for window, read in zip(pair.directions, (text, text[::-1]), strict=True):
        for b, first in enumerate((0, 5, 10, 13)):
            assert (pair.types[window.tokens[:, b]] == character_ids(read[first : first + 5])).all()
        assert not window.counted[:2, 3].any()


def test_windows_can_begin_in_the_middle(tmp_path: Path) -> None:
    streams = streams_of(open_text(tmp_path, TEXT), 2, 3)
    every, late = list(streams.windows()), list(streams.windows(1))
    assert len(late) == len(every) - 1 >= 2
    for expected, found in zip(every[1:], late, strict=True):
        assert _arrays(expected) == _arrays(found)


def _arrays(pair: WindowPair) -> list[object]:
    windows = [array.tolist() for w in pair.directions for array in (w.tokens, w.targets, w.counted)]
    return [pair.position, pair.types.tolist(), *windows]


def test_a_boundary_in_the_text_is_read_as_one(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    corpus = Corpus.open(write(tmp_path / "text", "a <S> b </S> c\n"), counts)
    vocabulary = Vocabulary.of(counts)
    assert vocabulary.words == ("</S>", "a", "b", "c")
    (pair,) = Streams(corpus, vocabulary, 1, 100).windows()
    assert [vocabulary.words[target] for target in pair.forward.targets.ravel()] == [
        "a",
        "</S>",
        "b",
        "</S>",
        "c",
        "</S>",
    ]
    assert (pair.types[pair.forward.tokens[2, 0]] == pair.types[pair.forward.tokens[0, 0]]).all()


def test_too_little_text_for_the_streams_is_named(tmp_path: Path) -> None:
    corpus = open_text(tmp_path, "a b\n")  # four tokens: three steps
    assert Streams(corpus, vocabulary_of(corpus), 3, 5).length == 1
    with pytest.raises(CorpusError, match=r"/text: 4 tokens are too few for 4 streams"):
        Streams(corpus, vocabulary_of(corpus), 4, 5)


# ---- byte order marks ------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    plain = open_text(tmp_path, LARGE)
    tokens = plain.tokens(0, plain.n_tokens)
    counts: Counter[str] = Counter()
    (marked := tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + LARGE.encode())
    found = Corpus.open(marked, counts)
    assert (found.n_tokens, found.digest) == (plain.n_tokens, plain.digest)
    assert found.tokens(0, found.n_tokens) == tokens
    assert found.tokens(5000, 5100) == tokens[5000:5100]
    assert not any("\ufeff" in word for word in counts)


def test_a_mark_elsewhere_is_a_character(tmp_path: Path) -> None:
    corpus = open_text(tmp_path, "a\n\ufeffb\n")
    assert corpus.tokens(0, corpus.n_tokens) == ["<S>", "a", "</S>", "<S>", "\ufeffb", "</S>"]


def test_another_encoding_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=": the text is UTF-16, little-endian, expected UTF-8$"):
        open_text(tmp_path, "\ufeffa b\n".encode("utf-16-le"))
