import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from bilm_system.files import replaced, write_bytes, write_text
from bilm_training.errors import RunError
from bilm_training.runs.records import EpochRecord, StepRecord
from bilm_training.runs.run_folder import RunFolder
from bilm_training.runs.run_log import RunLog

STEP = StepRecord(1, 1, 5.5, 5.0, 6.0, 1e-3, 0.5, 1000.0, 2.5)
EPOCH = EpochRecord(1, 2, 5.5, 100.0, 110.0, 1000.0, 5.0)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@contextmanager
def _files_end_after(n_bytes: int) -> Iterator[None]:
    """What a full disk looks like to a program, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _run(folder: RunFolder, steps: range, last_step: int = 0) -> None:
    """Two steps an epoch."""
    with RunLog(folder, last_step) as log:
        for n in steps:
            log.step(replace(STEP, step=n, epoch=(n + 1) // 2, loss=float(n)))
            if n % 2 == 0:
                log.epoch(replace(EPOCH, epoch=n // 2, step=n))


def _curve(folder: RunFolder, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    for path in folder.tensorboard.iterdir():  # read by name; in those of one second a counter's 10 sorts before its 9
        name, number = path.name.rsplit(".", 1)
        path.rename(path.with_name(f"{name}.{int(number):06}"))
    events = event_accumulator.EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_what_is_logged_is_read(folder: RunFolder) -> None:
    _run(folder, range(1, 5))
    assert list(folder.read_steps()) == [replace(STEP, step=n, epoch=(n + 1) // 2, loss=float(n)) for n in range(1, 5)]
    assert list(folder.read_epochs()) == [replace(EPOCH, epoch=n, step=2 * n) for n in (1, 2)]
    assert json.loads(folder.steps.read_text().splitlines()[0]) == asdict(replace(STEP, loss=1.0))
    assert _curve(folder, "train/loss") == [(n, float(n)) for n in range(1, 5)]
    assert _curve(folder, "valid/mean") == [(2, 105.0), (4, 105.0)]


def test_a_line_is_there_as_soon_as_it_is_logged(folder: RunFolder) -> None:
    with RunLog(folder) as log:
        log.step(STEP)
        assert list(folder.read_steps()) == [STEP]
        log.sync()


def test_a_run_that_goes_on_leaves_no_part_twice(folder: RunFolder) -> None:
    _run(folder, range(1, 8))
    _run(folder, range(4, 10), last_step=3)
    assert [record.step for record in folder.read_steps()] == list(range(1, 10))
    assert [record.step for record in folder.read_epochs()] == [2, 4, 6, 8]
    assert [step for step, _ in _curve(folder, "train/loss")] == list(range(1, 10))
    assert [step for step, _ in _curve(folder, "valid/forward")] == [2, 4, 6, 8]


def test_a_new_run_in_an_old_folder_begins_anew(folder: RunFolder) -> None:
    _run(folder, range(1, 8))
    _run(folder, range(1, 3))
    assert [record.step for record in folder.read_steps()] == [1, 2]
    assert _curve(folder, "train/loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("kept", [1, 40, 100])
def test_half_a_line_at_the_end_is_passed_over_and_cut_off(folder: RunFolder, kept: int) -> None:
    _run(folder, range(1, 3))
    whole = folder.steps.read_bytes()
    folder.steps.write_bytes(whole + whole.splitlines()[0][:kept])
    assert [record.step for record in folder.read_steps()] == [1, 2]
    _run(folder, range(3, 4), last_step=2)
    assert [record.step for record in folder.read_steps()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"step": 1', "delimiter"),
        ("\x00\xff", "utf-8|Expecting value"),
        ("7", "expected an object, found 7"),
        (json.dumps(asdict(STEP) | {"step": 1.5}), "step: expected a whole number, found 1.5"),
        (json.dumps(asdict(STEP) | {"step": True}), "step: expected a whole number, found True"),
        (json.dumps(asdict(STEP) | {"loss": "low"}), "loss: expected a number, found 'low'"),
        ('{"step": 1, "epoch": 1}', "loss: missing"),
    ],
)
def test_a_bad_line_is_named(folder: RunFolder, line: str, reason: str) -> None:
    good = json.dumps(asdict(STEP))
    folder.steps.write_text(f"{good}\n{line}\n{good}\n", encoding="latin-1")
    with pytest.raises(RunError, match=rf"steps\.jsonl, line 2: .*({reason})"):
        list(folder.read_steps())
    before = folder.steps.read_bytes()
    with pytest.raises(RunError, match="line 2"), RunLog(folder, 1):
        pass
    assert folder.steps.read_bytes() == before


def test_a_diverged_run_is_logged_in_json_that_others_read(folder: RunFolder) -> None:
    with RunLog(folder) as log:
        log.step(replace(STEP, loss=math.nan, gradient_norm=math.inf))
    values = json.loads(folder.steps.read_text(), parse_constant=pytest.fail)
    assert values["loss"] is values["gradient_norm"] is None
    (record,) = folder.read_steps()
    assert math.isnan(record.loss)
    assert record.loss_forward == STEP.loss_forward


def test_a_run_without_logs_has_no_records(folder: RunFolder) -> None:
    assert list(folder.read_steps()) == []
    assert list(folder.read_epochs()) == []


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("old", "neü"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def _write_bytes(path: Path) -> None:
    write_bytes(path, bytes(20_000))


def _save(path: Path) -> None:
    with replaced(path) as draft, draft.open("wb") as file:
        torch.save({"weights": torch.zeros(20_000)}, file)


@pytest.mark.parametrize("write", [_write_bytes, _save])
def test_without_room_the_old_file_stays(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    with _files_end_after(10_000), pytest.raises(OSError, match=r"checkpoint\.pt'$"):
        write(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_fails_leaves_the_old_file_and_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(FileNotFoundError, match="elsewhere'$"), replaced(path) as draft:
        draft.write_bytes((tmp_path / "elsewhere").read_bytes())
    with pytest.raises(KeyError), replaced(path) as draft:
        draft.write_bytes(dict[str, bytes]()["half"])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none/file'"):
        write_text(tmp_path / "none" / "file", "")


def test_a_name_that_is_not_utf_8_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a name in it isn't UTF-8: .*config\.toml'$"):
        write_text(tmp_path / "config.toml", os.fsdecode(b"train = 'caf\xe9'"))
    assert list(tmp_path.iterdir()) == []


def test_a_log_without_room_is_named_and_can_be_gone_on_with(folder: RunFolder) -> None:
    _run(folder, range(1, 9))
    limit = folder.steps.stat().st_size + 30
    with RunLog(folder, 8) as log, _files_end_after(limit), pytest.raises(OSError, match=r"steps\.jsonl'$"):
        log.step(replace(STEP, step=9))
    assert folder.steps.stat().st_size == limit  # half a line
    _run(folder, range(9, 10), last_step=8)
    assert [record.step for record in folder.read_steps()] == list(range(1, 10))


def test_an_error_of_the_training_stays_what_it_is(folder: RunFolder) -> None:
    with pytest.raises(OSError, match="^of something else$"), RunLog(folder):
        raise OSError("of something else")


def test_only_a_run_is_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none: no such folder"):
        RunFolder.of_run(tmp_path / "none")
    with pytest.raises(RunError, match="not the folder of a run"):
        RunFolder.of_run(tmp_path)
    folder = RunFolder(tmp_path / "a" / "run")
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.config, "")
    assert RunFolder.of_run(folder.path).path == folder.path


def test_a_folder_that_another_process_trains_into_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.taken():
        with pytest.raises(RunError, match="another process is training into it"), folder.taken():
            pass
        assert folder.path.exists()
    assert not folder.path.exists()
    with folder.taken():  # free again
        pass
