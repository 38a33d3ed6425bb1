"""What `bilm-embed` makes of which input: the layout of `allennlp elmo`, and what it refuses."""

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from bilm_client import Client
from bilm_client.batch.main import main

from tests.integration.batch_support import (
    REFUSED,
    SENTENCES,
    STOPPED,
    assert_same,
    datasets,
    embed,
    embed_command,
    embedding,
    ended,
    journal_of,
    part_of,
    run_of,
    write,
)
from tests.support.servers import LoopServer

LINES = ("The cat sat on the mat .", "Hello", "naïve café — 日本語")
LENGTHS = {"0": 7, "1": 1, "2": 4}
D = 16  # width of the tiny model
Shape = Callable[[int], tuple[int, ...]]
Start = Callable[..., LoopServer]
NOWHERE = "unix:/nonexistent/socket"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "in.txt", *LINES)


@pytest.mark.parametrize("suffix", ["hdf5", "h5", "npz"])
@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ([], lambda T: (3, T, D)),
        (["--layers", "all"], lambda T: (3, T, D)),
        (["--layers", "top"], lambda T: (T, D)),
        (["--layers", "average"], lambda T: (T, D)),
        (["--pool", "mean"], lambda T: (3, D)),
        (["--pool", "max", "--layers", "top"], lambda T: (D,)),
        (["--carry-state", "--layers", "average", "--pool", "mean"], lambda T: (D,)),
    ],
    ids=["default", "all", "top", "average", "mean", "max-top", "carried-mean-average"],
)
def test_one_dataset_a_line(  # noqa: PLR0917 - fixtures
    server: LoopServer, text: Path, tmp_path: Path, suffix: str, flags: list[str], shape: Shape
) -> None:
    output = tmp_path / f"out.{suffix}"
    assert embed(server.target, text, output, *flags) == 0
    found = datasets(output)
    assert {key: (vectors.shape, vectors.dtype) for key, vectors in found.items()} == {
        key: (shape(T), np.dtype("float32")) for key, T in LENGTHS.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", output.name]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_vectors_are_those_of_the_client(server: LoopServer, text: Path, tmp_path: Path, dtype: str) -> None:
    output = tmp_path / "out.hdf5"
    assert embed(server.target, text, output, "--dtype", dtype, "--batch-tokens", "1") == 0
    with Client(server.target) as client:
        expected = client.embed([line.split() for line in LINES], dtype="float16" if dtype == "float16" else "float32")
    found = datasets(output)
    by_key = {key: embedding.vectors for key, embedding in zip(LENGTHS, expected, strict=True)}
    assert_same(found, by_key, 1e-6 if dtype == "float32" else 1e-3)  # in other batches, and rounded after that


def test_layers_of_one_model_agree(server: LoopServer, text: Path, tmp_path: Path) -> None:
    found = {}
    for layers in ("all", "top", "average"):
        output = tmp_path / f"{layers}.hdf5"
        assert embed(server.target, text, output, "--layers", layers) == 0
        found[layers] = datasets(output)
    for key, vectors in found["all"].items():
        assert found["top"][key].tobytes() == vectors[-1].tobytes()
        assert np.abs(found["average"][key] - np.average(vectors, axis=0)).max() < 1e-6


def test_old_programs_read_it(server: LoopServer, tmp_path: Path) -> None:
    """As the loaders written for `allennlp elmo` do: sentence -> index -> vectors; of twins, the last one."""
    output = tmp_path / "out.hdf5"
    text = write(tmp_path / "in.txt", *LINES, LINES[0])
    assert embed(server.target, text, output) == 0
    with h5py.File(output, "r") as file:
        assert set(file) == {"0", "1", "2", "3", SENTENCES}
        assert file[SENTENCES].shape == (1,)
        assert h5py.check_string_dtype(file[SENTENCES].dtype)[:] == ("utf-8", None)  # of variable length
        sentence_to_index = json.loads(file.get(SENTENCES)[0])
        assert sentence_to_index == {LINES[1]: "1", LINES[2]: "2", LINES[0]: "3"}
        vectors = file.get(sentence_to_index[LINES[2]])
        assert vectors[()].shape == (3, 4, D)
        assert vectors.dtype.str == "<f4"


def test_what_the_run_was_is_recorded(server: LoopServer, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.hdf5"
    assert embed(server.target, text, output, "--layers", "top", "--pool", "max") == 0
    run = run_of(output)
    with Client(server.target) as client:
        info = client.model_info()
    assert (run["model"], run["model_version"]) == (info.name, info.version)
    assert len(run["input_sha256"]) == 64
    assert (run["options"]["layers"], run["options"]["pool"], run["options"]["dtype"]) == ("top", "max", "float32")
    archive = tmp_path / "out.npz"
    assert embed(server.target, text, archive, "--layers", "top", "--pool", "max") == 0
    with np.load(archive, allow_pickle=False) as arrays:
        assert json.loads(str(arrays["bilm_serve"])) == run
        assert arrays[SENTENCES].shape == (1,)
        assert json.loads(arrays[SENTENCES][0]) == {line: str(i) for i, line in enumerate(LINES)}


@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
def test_sentences_as_keys(server: LoopServer, text: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out.{suffix}"
    assert embed(server.target, text, output, "--use-sentence-keys") == 0
    assert {key: vectors.shape for key, vectors in datasets(output).items()} == {
        line: (3, T, D) for line, T in zip(LINES, LENGTHS.values(), strict=True)
    }
    names = np.load(output).files if suffix == "npz" else list(h5py.File(output))
    assert SENTENCES not in names


@pytest.mark.parametrize("bad", ["and / or", LINES[0], ".", "bilm_serve", "nul \0 in it", "x" * 65_001])
@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
def test_sentences_that_cannot_be_keys(
    server: LoopServer, tmp_path: Path, suffix: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = write(tmp_path / "in.txt", *LINES, bad, "fine"), tmp_path / f"out.{suffix}"
    assert embed(NOWHERE, text, output, "--use-sentence-keys") == REFUSED
    assert "lines 4\n" in capsys.readouterr().err
    assert embed(server.target, text, output, "--layers", "top") == 0
    assert datasets(output).keys() == {"0", "1", "2", "3", "4"}  # as lines they are good


def test_sentences_forgotten(server: LoopServer, text: Path, tmp_path: Path) -> None:
    output, archive = tmp_path / "out.hdf5", tmp_path / "out.npz"
    assert embed(server.target, text, output, "--forget-sentences") == 0
    assert embed(server.target, text, archive, "--forget-sentences") == 0
    with h5py.File(output) as file, np.load(archive) as arrays:
        assert set(file) == {"0", "1", "2"}
        assert set(arrays) == {"0", "1", "2", "bilm_serve"}


def test_raw_text_is_tokenised_by_the_server(server: LoopServer, tmp_path: Path) -> None:
    lines = ["Don't panic, please.", "Hello."]
    text, output = write(tmp_path / "in.txt", *lines), tmp_path / "out.hdf5"
    assert embed(server.target, text, output, "--raw") == 0
    with Client(server.target) as client:
        expected = client.embed(lines)
    assert len(expected[0].tokens) > len(lines[0].split())
    assert_same(datasets(output), {str(i): embedding.vectors for i, embedding in enumerate(expected)}, 1e-6)


# ---- what the input may look like ----


def test_blank_lines_are_listed(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.write_text("\na b\n\n \t\nc\n\n\n")
    assert embed(NOWHERE, text, tmp_path / "out.hdf5") == REFUSED
    assert capsys.readouterr().err == "bilm-embed: input: blank lines: 1, 3, 4, 6, 7 (--skip-blank passes over them)\n"
    text.write_text("\n" * 25 + "a")
    assert embed(NOWHERE, text, tmp_path / "out.hdf5") == REFUSED
    assert "19, 20 and 5 more (" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--carry-state"]], ids=["batches", "carried"])
def test_keys_remain_line_numbers_where_blank_lines_are_skipped(
    server: LoopServer, text: Path, tmp_path: Path, flags: list[str]
) -> None:
    text.write_text("\na b\n\n \t\nc\n\n")
    output = tmp_path / "out.hdf5"
    assert embed(server.target, text, output, "--skip-blank", *flags) == 0
    assert {key: vectors.shape for key, vectors in datasets(output).items()} == {"1": (3, 2, D), "4": (3, 1, D)}
    with h5py.File(output) as file:
        assert json.loads(file[SENTENCES][0]) == {"a b": "1", "c": "4"}


@pytest.mark.parametrize(
    "content",
    [b"a b\nc\n", b"a b\nc", b"a b\r\nc\r\n", b" a  b \n\tc\t\n"],
    ids=["plain", "no newline at the end", "CRLF", "more white space"],
)
def test_line_ends_and_white_space(server: LoopServer, text: Path, tmp_path: Path, content: bytes) -> None:
    text.write_bytes(content)
    output = tmp_path / "out.hdf5"
    assert embed(server.target, text, output) == 0
    with Client(server.target) as client:
        expected = client.embed([["a", "b"], ["c"]])
    assert_same(datasets(output), {str(i): embedding.vectors for i, embedding in enumerate(expected)}, 1e-6)


def test_standard_input(server: LoopServer, tmp_path: Path, text: Path) -> None:
    by_name, by_stream = tmp_path / "name.hdf5", tmp_path / "stream.hdf5"
    with text.open("rb") as stream, embedding(server.target, Path("-"), by_stream, stdin=stream) as process:
        assert ended(process) == (0, "")
    assert embed(server.target, text, by_name) == 0
    assert datasets(by_stream).keys() == datasets(by_name).keys() == LENGTHS.keys()
    assert run_of(by_stream) == run_of(by_name)


def test_a_pipe_can_be_read_once_only_and_is_copied(server: LoopServer, tmp_path: Path, text: Path) -> None:
    pipe, output = tmp_path / "pipe", tmp_path / "out.hdf5"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text.read_bytes(),))
    writer.start()
    assert embed(server.target, pipe, output) == 0
    writer.join()
    assert datasets(output).keys() == LENGTHS.keys()


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n"])
def test_an_input_without_a_sentence(
    text: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_bytes(content)
    assert embed(NOWHERE, text, tmp_path / "out.hdf5", "--skip-blank") == REFUSED
    assert "no sentence in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_an_input_that_cannot_be_read(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(NOWHERE, tmp_path / name, tmp_path / "out.hdf5") == REFUSED
    assert capsys.readouterr().err.startswith("bilm-embed: input: ")
    assert list(tmp_path.iterdir()) == []


def test_standard_input_that_is_closed(tmp_path: Path) -> None:
    command = embed_command(NOWHERE, Path("-"), tmp_path / "out.npz")
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    done = subprocess.run(closed, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (REFUSED, "bilm-embed: input: -: standard input is closed\n")


def test_the_input_is_not_written_over(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = text.read_bytes()
    (link := tmp_path / "link.npz").symlink_to(text)
    assert embed(NOWHERE, text, link, "--overwrite") == REFUSED
    assert "output: the input is this file" in capsys.readouterr().err
    assert embed(NOWHERE, text, tmp_path / "out.npz", "--errors", str(text)) == REFUSED
    assert "errors: the input is this file" in capsys.readouterr().err
    assert text.read_bytes() == before


# ---- the beginning of a text, and the ends of its lines ----

MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_the_text(server: LoopServer, text: Path, tmp_path: Path) -> None:
    (marked := tmp_path / "marked.txt").write_bytes(MARK + text.read_bytes() + MARK + b"in the middle\n")
    text.write_bytes(text.read_bytes() + MARK + b"in the middle\n")
    outputs = tmp_path / "marked.hdf5", tmp_path / "plain.hdf5"
    for source, output in zip((marked, text), outputs, strict=True):
        assert embed(server.target, source, output) == 0
    assert_same(datasets(outputs[0]), datasets(outputs[1]), 0)
    with h5py.File(outputs[0]) as file:
        sentences = json.loads(file[SENTENCES][0])
    assert sentences == {**{line: str(index) for index, line in enumerate(LINES)}, "\ufeffin the middle": "3"}


def test_a_byte_order_mark_is_no_part_of_a_key(server: LoopServer, text: Path, tmp_path: Path) -> None:
    text.write_bytes(MARK + b"Hello\n")
    assert embed(server.target, text, tmp_path / "out.npz", "--use-sentence-keys") == 0
    assert datasets(tmp_path / "out.npz").keys() == {"Hello"}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_another_encoding_is_named(
    text: Path, tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_bytes("\ufeffHello\n".encode(encoding))
    assert embed(NOWHERE, text, tmp_path / "out.hdf5", "--errors", str(tmp_path / "errors")) == REFUSED
    name, order = encoding[:-3].upper(), {"le": "little", "be": "big"}[encoding[-2:]]
    expected = f"bilm-embed: input: {text}: the text is {name}, {order}-endian, expected UTF-8\n"
    assert capsys.readouterr().err == expected


def test_only_a_line_feed_ends_a_line(server: LoopServer, text: Path, tmp_path: Path) -> None:
    text.write_bytes("one\rtwo\r\nthree\u2028four\ffive\nsix".encode())
    assert embed(server.target, text, tmp_path / "out.hdf5", "--pool", "none", "--layers", "top") == 0
    assert {key: len(vectors) for key, vectors in datasets(tmp_path / "out.hdf5").items()} == {"0": 2, "1": 3, "2": 1}


def test_a_configuration_file_may_begin_with_a_byte_order_mark(server: LoopServer, text: Path, tmp_path: Path) -> None:
    (config := tmp_path / "embed.toml").write_bytes(MARK + f'target = "{server.target}"\r\nlayers = "top"'.encode())
    assert main([str(text), str(tmp_path / "out.hdf5"), "--config", str(config)]) == 0
    assert run_of(tmp_path / "out.hdf5")["options"]["layers"] == "top"


# ---- settings ----


def test_every_bad_setting_is_listed(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--layers", "some", "--batch-tokens", "0", "--timeout-s", "-1", "--resume", "--overwrite", "--target", ""]
    assert main([str(text), str(tmp_path / "out.json"), *flags]) == REFUSED
    errors = capsys.readouterr().err
    for name in ("output", "layers", "batch_tokens", "timeout_s", "overwrite", "target"):
        assert f"bilm-embed: {name}: " in errors
    assert errors.count("\n") == 6


def test_an_output_of_unknown_kind_or_in_no_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(NOWHERE, text, tmp_path / "out.txt") == REFUSED
    assert "ends in .hdf5, .h5 or .npz" in capsys.readouterr().err
    assert embed(NOWHERE, text, tmp_path / "missing" / "out.npz") == REFUSED
    assert "no such folder" in capsys.readouterr().err


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    server: LoopServer, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "embed.toml"
    config.write_text(f'target = "{server.target}"\nlayers = "top"\npool = "max"\ndtype = "float16"\n')
    monkeypatch.setenv("BILM_EMBED_POOL", "mean")
    monkeypatch.setenv("BILM_EMBED_DTYPE", "float16")
    output = tmp_path / "out.hdf5"
    assert main([str(text), str(output), "--config", str(config), "--dtype", "float32"]) == 0
    options = run_of(output)["options"]
    assert (options["layers"], options["pool"], options["dtype"]) == ("top", "mean", "float32")
    monkeypatch.setenv("BILM_EMBED_CONFIG", str(config))
    monkeypatch.delenv("BILM_EMBED_POOL")
    assert main([str(text), str(output), "--overwrite"]) == 0
    options = run_of(output)["options"]
    assert (options["layers"], options["pool"], options["dtype"]) == ("top", "max", "float16")


@pytest.mark.parametrize("content", ["layers = ", 'lairs = "top"\n', None], ids=["no TOML", "unknown name", "no file"])
def test_a_bad_configuration_file(
    text: Path, tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "embed.toml"
    if content is not None:
        config.write_text(content)
    assert main([str(text), str(tmp_path / "out.hdf5"), "--config", str(config)]) == REFUSED
    assert ("lairs" if content and "lairs" in content else "embed.toml") in capsys.readouterr().err


# ---- bad lines ----

BAD_LINES = b"good one\n\xff\xfe bad\nthis one is longer than five tokens\nlast one\n"


def read_errors(path: Path) -> list[tuple[int, str, str]]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(error) == {"line", "reason", "message"} for error in found)
    return sorted((error["line"], error["reason"], error["message"]) for error in found)


@pytest.mark.parametrize("flags", [[], ["--carry-state"]], ids=["batches", "carried"])
def test_bad_lines_are_listed_and_the_run_goes_on(
    start: Start, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    server = start("--max-tokens-per-sentence", "5")
    text.write_bytes(BAD_LINES)
    output, errors = tmp_path / "out.hdf5", tmp_path / "errors.jsonl"
    assert embed(server.target, text, output, "--errors", str(errors), *flags) == 0
    (line_2, reason_2, message_2), (line_3, reason_3, message_3) = read_errors(errors)
    assert (line_2, reason_2) == (2, "LINE_INVALID")
    assert message_2.startswith("not UTF-8")
    assert (line_3, reason_3) == (3, "SENTENCE_TOO_LONG")
    assert "7" in message_3
    assert "sentence 1" not in message_3  # its place in the request says nothing to anyone
    assert {key: vectors.shape for key, vectors in datasets(output).items()} == {"0": (3, 2, D), "3": (3, 2, D)}
    with h5py.File(output) as file:
        assert json.loads(file[SENTENCES][0]) == {"good one": "0", "last one": "3"}
    assert "2 sentences, 2 failed" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--carry-state"]], ids=["batches", "carried"])
@pytest.mark.parametrize(
    ("bad", "reason"), [(b"\xff bad", "LINE_INVALID"), (b"this one is far too long", "SENTENCE_TOO_LONG")]
)
def test_the_first_bad_line_stops_a_run_that_has_no_list(  # noqa: PLR0917 - fixtures
    start: Start,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    bad: bytes,
    reason: str,
) -> None:
    server = start("--max-tokens-per-sentence", "5")
    text.write_bytes(b"good one\n" * 40 + bad + b"\nlast one\n")
    output, errors = tmp_path / "out.hdf5", tmp_path / "errors.jsonl"
    flags = [*flags, "--batch-tokens", "8", "--concurrency", "1"]
    assert embed(server.target, text, output, *flags) == STOPPED
    stopped = capsys.readouterr().err
    assert f"line 41: {reason}: " in stopped
    assert "--resume goes on" in stopped
    assert journal_of(output).exists()
    assert not output.exists()
    assert not part_of(output).exists()

    assert embed(server.target, text, output, *flags, "--resume", "--errors", str(errors)) == 0
    assert "of them by an earlier run" in capsys.readouterr().out
    assert [error[:2] for error in read_errors(errors)] == [(41, reason)]
    assert datasets(output).keys() == {str(i) for i in range(42)} - {"40"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.jsonl", "in.txt", "out.hdf5"]
