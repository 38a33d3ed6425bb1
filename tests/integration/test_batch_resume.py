"""Interrupted runs of `bilm-embed`: what is left behind, how they go on, and when they mustn't."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import pytest
from bilm_client.batch.journal import Journal

from tests.integration.batch_support import (
    REFUSED,
    STOPPED,
    Datasets,
    Valve,
    assert_same,
    datasets,
    embed,
    embedding,
    ended,
    journal_of,
    part_of,
    wait_for_size,
    write,
)
from tests.support.server_processes import ProcessServer
from tests.support.servers import LoopServer, serving

Start = Callable[..., LoopServer]

N_LINES = 60
HELD_AFTER = 25  # batches, and with the flags below lines
MIDDLE_BYTES = 20_000  # of about 1,070 a line: at least one state has been written
FLAGS = ("--batch-tokens", "1", "--concurrency", "1")
BATCHES, CARRIED = pytest.param((), id="batches"), pytest.param(("--carry-state",), id="carried")
TOLERANCE = 1e-6
OTHER_MODEL = str(Path(__file__).parents[1] / "data" / "golden" / "tanh-3layers")
JOURNALS = Path(__file__).parents[1] / "data" / "journals"
OLD_MODEL = str(Path(__file__).parents[1] / "data" / "golden" / "relu-2highway")
NOWHERE = "unix:/nonexistent/socket"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "in.txt", *(f"this is line number {i}" for i in range(N_LINES)))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.hdf5"


@pytest.fixture
def valve() -> Iterator[Valve]:
    valve = Valve()
    yield valve
    valve.open()


@pytest.fixture
def listen() -> Iterator[str]:
    """An address that outlives its server; short, as the path of a Unix socket has to be."""
    with tempfile.TemporaryDirectory(prefix="bilm-") as folder:
        yield f"unix:{folder}/socket"


@pytest.fixture
def uninterrupted(server: LoopServer, text: Path, tmp_path: Path) -> Callable[..., Datasets]:
    def run(*flags: str) -> Datasets:
        folder = tmp_path.with_name(tmp_path.name + "-uninterrupted")
        folder.mkdir()
        assert embed(server.target, text, folder / "out.hdf5", *flags) == 0
        return datasets(folder / "out.hdf5")

    return run


@pytest.fixture
def interrupt(server: LoopServer, text: Path, output: Path) -> Callable[..., None]:
    """Leaves a journal behind, by a disk that is full when the output is written."""

    def run(*flags: str) -> None:
        with full_disk():
            assert embed(server.target, text, output, *FLAGS, *flags) == STOPPED
        assert journal_of(output).exists()

    return run


@contextmanager
def full_disk() -> Iterator[None]:
    """Let whatever is written to a disk find no space there."""
    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        yield


def wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    """Waits until the run has said so on its standard error."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        if words in line:
            return
        seen.append(line)
    raise AssertionError("".join(seen))


def assert_whole(output: Path, expected: Datasets) -> None:
    assert_same(datasets(output), expected, TOLERANCE)
    assert sorted(path.name for path in output.parent.iterdir()) == ["in.txt", output.name]


# ---- the disk is full ----


@pytest.mark.parametrize("name", ["out.hdf5", "out.npz"])
def test_a_disk_that_is_full_when_the_output_is_written(server: LoopServer, text: Path, name: str) -> None:
    output, small = text.with_name(name), ("--pool", "mean", "--layers", "top", "--dtype", "float16")
    write(text, *(f"line {i}" for i in range(400)))
    limit_bytes = 80_000  # between the journal's size and the output's

    with embedding(server.target, text, output, *small) as process:
        # At once: the process has hardly begun to import what it needs
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        code, errors = ended(process)
    assert code == STOPPED
    assert errors.splitlines() == [
        f"bilm-embed: {output}: File too large",
        "bilm-embed: the run stopped; what is done is kept, --resume goes on",
    ]
    assert sorted(path.name for path in text.parent.iterdir()) == ["in.txt", journal_of(output).name]
    assert embed(server.target, text, output, *small, "--resume") == 0
    assert output.stat().st_size > limit_bytes
    assert len(datasets(output)) == 400


def test_a_full_disk_names_the_journal(server: LoopServer, text: Path, output: Path) -> None:
    write(text, *(f"line {i}" for i in range(400)))
    limit_bytes = 100_000

    with embedding(server.target, text, output, "--pool", "mean") as process:
        # At once: the process has hardly begun to import what it needs
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        code, errors = ended(process)
    assert (code, errors.splitlines()) == (STOPPED, stopped_at(journal_of(output), "File too large"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_a_full_disk_names_the_list_of_errors(server: LoopServer, text: Path, output: Path) -> None:
    (folder := text.parent / "small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("a file system can't be mounted here")
    try:
        text.write_bytes(b"\xff\n" * 2000)
        with embedding(server.target, text, output, "--errors", str(folder / "errors")) as process:
            code, errors = ended(process)
        assert (code, errors.splitlines()) == (STOPPED, stopped_at(folder / "errors", "No space left on device"))
    finally:
        subprocess.run(["umount", folder], check=True)


def stopped_at(path: Path, why: str) -> list[str]:
    return [f"bilm-embed: {path}: {why}", "bilm-embed: the run stopped; what is done is kept, --resume goes on"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_a_full_file_system(server: LoopServer, text: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("a file system can't be mounted here")
    try:
        output, small = folder / "out.hdf5", ("--pool", "mean", "--layers", "top", "--dtype", "float16")
        write(text, *(f"line number {i}" for i in range(1500)))
        ballast = folder / "ballast"
        with suppress(OSError), ballast.open("wb") as file:
            file.write(bytes(1_200_000))
        with embedding(server.target, text, output, *small) as process:
            code, errors = ended(process)
        assert (code, len(errors.splitlines())) == (STOPPED, 2), errors
        ballast.unlink()
        assert embed(server.target, text, output, *small, "--resume") == 0
        assert len(datasets(output)) == 1500
    finally:
        subprocess.run(["umount", folder], check=True)


# ---- an older version's runs ----

OLD_TEXT = "A first line .\nand\xa0a second one\r\nthe third\n".encode()
OLD_FLAGS = ("--layers", "top", "--pool", "mean", "--resume")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("plain", OLD_TEXT, "precision"),
        ("marked", b"\xef\xbb\xbfA first line .\nthe second\n", "byte_order_mark, precision"),
    ],
)
def test_a_journal_of_version_0_1_is_refused_with_one_line(  # noqa: PLR0917 - fixtures
    start: Start, text: Path, output: Path, name: str, content: bytes, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_bytes(content)
    shutil.copy(JOURNALS / f"0.1-{name}.journal", journal_of(output))
    assert embed(start("--model", OLD_MODEL).target, text, output, *OLD_FLAGS) == REFUSED
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert f"made with another {what}" in errors[0]


# ---- the client goes ----


@pytest.mark.parametrize("flags", [BATCHES, CARRIED])
def test_after_a_kill_of_the_client(  # noqa: PLR0917 - fixtures
    valve: Valve,
    start: Start,
    text: Path,
    output: Path,
    flags: tuple[str, ...],
    uninterrupted: Callable[..., Datasets],
    capsys: pytest.CaptureFixture[str],
) -> None:
    valve.hold((server := start()).engine)
    valve.let_through(HELD_AFTER)
    with embedding(server.target, text, output, *FLAGS, *flags) as process:
        wait_for_size(journal_of(output), MIDDLE_BYTES, process)
        assert not output.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()
    journal = Journal.reopen(journal_of(output))
    assert 16 < sum(1 for _ in journal.records()) <= HELD_AFTER
    journal.close()
    valve.open()
    assert embed(server.target, text, output, *FLAGS, *flags, "--resume") == 0
    assert "of them by an earlier run" in capsys.readouterr().out
    assert_whole(output, uninterrupted(*flags))


def test_after_a_kill_that_cut_a_record(
    server: LoopServer, interrupt: Callable[..., None], text: Path, output: Path, uninterrupted: Callable[..., Any]
) -> None:
    interrupt()
    journal = journal_of(output)
    os.truncate(journal, journal.stat().st_size - 100)
    part_of(output).write_bytes(b"half an output")
    assert embed(server.target, text, output, "--resume") == 0
    assert_whole(output, uninterrupted())


def test_an_interrupt_from_the_keyboard(valve: Valve, start: Start, text: Path, output: Path) -> None:
    valve.hold((server := start()).engine)
    valve.let_through(HELD_AFTER)
    with embedding(server.target, text, output, *FLAGS) as process:
        wait_for_size(journal_of(output), MIDDLE_BYTES, process)
        process.send_signal(signal.SIGINT)
        code, errors = ended(process)
    assert code == 130
    assert "--resume goes on" in errors
    assert "Traceback" not in errors
    assert journal_of(output).exists()
    assert not output.exists()


# ---- the server goes ----


@pytest.mark.parametrize("flags", [BATCHES, CARRIED])
def test_a_run_outlives_a_kill_and_restart_of_the_server(
    listen: str, text: Path, output: Path, flags: tuple[str, ...], uninterrupted: Callable[..., Datasets]
) -> None:
    write(text, *(f"this is line number {i}" for i in range(400)))  # so many that the kill comes before the end
    with ExitStack() as stack:
        server = stack.enter_context(ProcessServer("--threads", "1", listen=listen))
        process = stack.enter_context(embedding(listen, text, output, *FLAGS, *flags, "--patience-s", "60"))
        wait_for_size(journal_of(output), MIDDLE_BYTES, process)
        server.kill()
        wait_for_line(process, "trying again")
        assert not output.exists()
        stack.enter_context(serving("--listen", listen))
        assert ended(process)[0] == 0
    assert_whole(output, uninterrupted(*flags))


@contextmanager
def stopping(server: ExitStack, valve: Valve) -> Iterator[None]:
    """Stops a server while its model is held; the body waits for what the client makes of it."""
    thread = threading.Thread(target=server.close)
    thread.start()
    try:
        yield
    finally:
        valve.open()
        thread.join()


@pytest.mark.parametrize("flags", [BATCHES, CARRIED])
def test_without_patience_a_run_stops_with_the_server_and_is_resumed(  # noqa: PLR0917 - fixtures
    valve: Valve,
    listen: str,
    text: Path,
    output: Path,
    flags: tuple[str, ...],
    uninterrupted: Callable[..., Datasets],
) -> None:
    server = ExitStack()
    valve.hold(server.enter_context(serving("--listen", listen)).engine)
    valve.let_through(HELD_AFTER)
    with embedding(listen, text, output, *FLAGS, *flags, "--patience-s", "0") as process:
        wait_for_size(journal_of(output), MIDDLE_BYTES, process)
        with stopping(server, valve):
            code, errors = ended(process)
    assert (code, "--resume goes on" in errors) == (STOPPED, True)
    assert journal_of(output).exists()
    assert not output.exists()
    with serving("--listen", listen):
        assert embed(listen, text, output, *FLAGS, *flags, "--resume") == 0
    assert_whole(output, uninterrupted(*flags))


@pytest.mark.parametrize("flags", [BATCHES, CARRIED])
def test_a_server_that_comes_back_with_another_model(  # noqa: PLR0917 - fixtures
    valve: Valve,
    listen: str,
    text: Path,
    output: Path,
    flags: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ("--listen", listen, "--served-model-name", "same")
    server = ExitStack()
    valve.hold(server.enter_context(serving(*where)).engine)
    valve.let_through(HELD_AFTER)
    with embedding(listen, text, output, *FLAGS, *flags, "--patience-s", "60") as process:
        wait_for_size(journal_of(output), MIDDLE_BYTES, process)
        with stopping(server, valve):
            wait_for_line(process, "trying again")
        with serving("--model", OTHER_MODEL, *where):
            code, errors = ended(process)
            assert (code, "version" in errors) == (STOPPED, True)
            assert embed(listen, text, output, *FLAGS, *flags, "--resume") == REFUSED
    assert "made with another model_version;" in capsys.readouterr().err
    assert not output.exists()


# ---- going on, and not ----


def test_an_empty_journal_of_a_machine_that_crashed_is_no_obstacle(
    server: LoopServer, text: Path, output: Path
) -> None:
    journal_of(output).touch()
    assert embed(server.target, text, output, "--resume") == 0
    assert len(datasets(output)) == N_LINES


def test_an_output_that_cannot_be_written_is_made_later(
    server: LoopServer,
    text: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with full_disk():
        assert embed(server.target, text, output) == STOPPED
    errors = capsys.readouterr().err
    assert os.strerror(errno.ENOSPC) in errors
    assert "--resume goes on" in errors
    assert not output.exists()
    assert not part_of(output).exists()
    assert embed(server.target, text, output, "--resume") == 0
    assert f"{N_LINES} sentences, {N_LINES} of them by an earlier run; 0 tokens" in capsys.readouterr().out
    assert len(datasets(output)) == N_LINES


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--layers", "top"], "layers"),
        (["--carry-state", "--dtype", "float16"], "carry_state, dtype"),
        (["--pool", "max", "--raw", "--skip-blank"], "pool, raw, skip_blank"),
    ],
)
def test_other_options_do_not_go_on_with_it(  # noqa: PLR0917 - fixtures
    server: LoopServer,
    interrupt: Callable[..., None],
    text: Path,
    output: Path,
    flags: list[str],
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt()
    before = journal_of(output).read_bytes()
    assert embed(server.target, text, output, "--resume", *flags) == REFUSED
    assert f"made with another {what};" in capsys.readouterr().err
    assert journal_of(output).read_bytes() == before
    assert embed(server.target, text, output, "--resume") == 0  # batch size and the like may change
    assert embed(server.target, text, output, "--resume", *flags) == REFUSED  # nor take it for theirs
    assert f"made with another {what};" in capsys.readouterr().err


def test_another_input_or_model_does_not_go_on_with_it(  # noqa: PLR0917 - fixtures
    server: LoopServer,
    start: Start,
    interrupt: Callable[..., None],
    text: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt()
    assert embed(start("--model", OTHER_MODEL).target, text, output, "--resume") == REFUSED
    assert "made with another model, model_version;" in capsys.readouterr().err
    write(text, "something else")
    assert embed(server.target, text, output, "--resume") == REFUSED
    assert "made with another input_sha256;" in capsys.readouterr().err


def test_a_server_of_another_precision_does_not_go_on_with_it(
    start: Start, interrupt: Callable[..., None], text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt()
    capsys.readouterr()
    before = journal_of(output).read_bytes()
    assert embed(start("--precision", "bfloat16").target, text, output, "--resume") == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert "made with another precision; can't be resumed (precision: then float32, now bfloat16)" in line
    assert journal_of(output).read_bytes() == before


def test_a_journal_that_does_not_say_its_precision_is_refused_in_one_line(
    server: LoopServer, interrupt: Callable[..., None], text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As versions up to 0.1.0 wrote it: nobody knows what would be mixed."""
    interrupt()
    journal = Journal.reopen(journal_of(output))
    identity, records = dict(journal.identity), list(journal.records())
    journal.close()
    del identity["precision"]
    older = Journal.create(journal_of(output), identity)
    for record in records:
        older.append(record)
    older.close()
    before = journal_of(output).read_bytes()
    capsys.readouterr()
    assert embed(server.target, text, output, "--resume") == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert "made with another precision; can't be resumed (precision: then not recorded, now float32)" in line
    assert "--overwrite starts anew" in line
    assert journal_of(output).read_bytes() == before


@pytest.mark.parametrize("name", ["out.hdf5", "out.npz"])
def test_a_whole_output(
    server: LoopServer, text: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    assert embed(server.target, text, output) == 0
    before = output.read_bytes()
    assert embed(NOWHERE, text, output) == REFUSED
    assert "is there already" in capsys.readouterr().err
    assert embed(server.target, text, output, "--resume") == 0
    assert "whole already" in capsys.readouterr().out
    assert output.read_bytes() == before


@pytest.mark.parametrize("name", ["out.hdf5", "out.npz"])
@pytest.mark.parametrize("content", ["of another program", "of no kind"])
def test_a_file_that_is_not_ours_is_left_alone(
    server: LoopServer, text: Path, tmp_path: Path, name: str, content: str
) -> None:
    output = tmp_path / name
    if content == "of no kind":
        output.write_bytes(b"something precious")
    elif name == "out.hdf5":
        h5py.File(output, "w").close()
    else:
        shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path, "in.txt")
        (tmp_path / "other.zip").rename(output)
    before = output.read_bytes()
    assert embed(server.target, text, output) == REFUSED
    assert embed(server.target, text, output, "--resume") == REFUSED
    assert output.read_bytes() == before
    assert embed(server.target, text, output, "--overwrite") == 0
    assert len(datasets(output)) == N_LINES


def test_a_journal_without_resume(
    interrupt: Callable[..., None], text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt()
    before = journal_of(output).read_bytes()
    assert embed(NOWHERE, text, output) == REFUSED
    assert "an interrupted run is there" in capsys.readouterr().err
    assert journal_of(output).read_bytes() == before


def test_overwrite_starts_anew(
    server: LoopServer, interrupt: Callable[..., None], text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt()
    assert embed(server.target, text, output, "--overwrite", "--layers", "top") == 0
    assert "earlier run" not in capsys.readouterr().out
    assert datasets(output)["0"].ndim == 2
    assert embed(server.target, text, output, "--overwrite") == 0
    assert datasets(output)["0"].ndim == 3
    assert not journal_of(output).exists()


def test_an_interrupted_overwrite_goes_on_too(
    server: LoopServer, interrupt: Callable[..., None], text: Path, output: Path, uninterrupted: Callable[..., Any]
) -> None:
    assert embed(server.target, text, output, "--layers", "top") == 0
    interrupt("--overwrite")
    assert datasets(output)["0"].ndim == 2  # the old one, until the new one is whole
    assert embed(server.target, text, output, "--resume") == 0
    assert_whole(output, uninterrupted())


def test_errors_of_an_earlier_run_stop_one_that_has_no_list(
    server: LoopServer, text: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_bytes(b"good\n\xff\ngood\n")
    listed = ("--errors", str(tmp_path / "errors"))
    with full_disk():
        assert embed(server.target, text, output, *listed) == STOPPED
    assert embed(server.target, text, output, "--resume") == STOPPED
    assert "line 2: LINE_INVALID" in capsys.readouterr().err
    before = (tmp_path / "errors").read_text()
    assert embed(server.target, text, output, "--resume", *listed) == 0
    assert (tmp_path / "errors").read_text() == before != ""
    assert datasets(output).keys() == {"0", "2"}


def test_of_two_runs_at_once_the_second_is_refused(  # noqa: PLR0917 - fixtures
    valve: Valve,
    start: Start,
    text: Path,
    output: Path,
    uninterrupted: Callable[..., Datasets],
    capsys: pytest.CaptureFixture[str],
) -> None:
    valve.hold((server := start()).engine)
    valve.let_through(HELD_AFTER)
    with embedding(server.target, text, output, *FLAGS) as process:
        wait_for_size(journal_of(output), MIDDLE_BYTES, process)
        for flags, reason in [
            ((), "an interrupted run is there"),
            (("--resume",), "another run is writing it"),
            (("--overwrite",), "another run is writing it"),
        ]:
            assert embed(server.target, text, output, *flags) == REFUSED
            assert reason in capsys.readouterr().err
        valve.open()
        assert ended(process)[0] == 0
    assert_whole(output, uninterrupted())
