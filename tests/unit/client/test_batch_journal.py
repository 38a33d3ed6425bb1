"""The journal: what a kill at any moment, a crash of the machine or a second run may do to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from bilm_client.batch.journal import Journal, JournalBusyError, JournalRecord
from bilm_client.cli.settings_sources import UsageError
from bilm_system.files import lock
from hypothesis import given
from hypothesis import strategies as st

RUN = {"input_sha256": "00", "options": {"layers": "all"}, "model": "m", "model_version": "1"}


def record(index: int, state: bytes = b"") -> JournalRecord:
    return JournalRecord(index, 2, np.arange(12, dtype=np.float32).reshape(3, 2, 2) + index, state=state)


RECORDS = [
    record(0, b"state 0"),
    JournalRecord(1, 0, None, reason="TOO_BAD", message="a bad line"),
    record(2, b"state 2"),
]


def as_tuples(journal: Journal) -> list[tuple[object, ...]]:
    return [
        (r.index, r.n_tokens, None if r.vectors is None else r.vectors.tolist(), r.reason, r.message, r.state)
        for r in journal.records()
    ]


def fill(path: Path, records: list[JournalRecord]) -> list[int]:
    """The size of the file after its beginning and after each record."""
    journal = Journal.create(path, RUN)
    sizes = [path.stat().st_size]
    for each in records:
        journal.append(each)
        journal.flush()
        sizes.append(path.stat().st_size)
    journal.close()
    return sizes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.hdf5.journal"


@pytest.fixture
def whole(path: Path) -> Iterator[Journal]:
    fill(path, RECORDS)
    journal = Journal.reopen(path)
    yield journal
    journal.close()


def test_what_went_in_comes_out(whole: Journal) -> None:
    assert whole.identity == RUN
    first, second, third = whole.records()
    assert (first.index, first.n_tokens, first.state) == (0, 2, b"state 0")
    assert first.vectors is not None
    assert (first.vectors.dtype.str, first.vectors.shape) == ("<f4", (3, 2, 2))
    assert (second.vectors, second.reason, second.message, second.state) == (None, "TOO_BAD", "a bad line", b"")
    assert third.vectors is not None
    np.testing.assert_array_equal(third.vectors, np.arange(12, dtype=np.float32).reshape(3, 2, 2) + 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals")


def check_that_the_last_record_only_is_lost(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    journal = Journal.reopen(path)
    try:
        assert [found[0] for found in as_tuples(journal)] == [0, 1]
        journal.append(record(7))
        assert [found[0] for found in as_tuples(journal)] == [0, 1, 7]
    finally:
        journal.close()
    again = Journal.reopen(path)
    assert [found[0] for found in as_tuples(again)] == [0, 1, 7]
    again.close()


@given(st.data())
def test_a_record_that_was_cut_off_is_lost_and_no_other(folder: Path, data: st.DataObject) -> None:
    path = folder / "cut"
    sizes = fill(path, RECORDS)
    cut = data.draw(st.integers(sizes[-2], sizes[-1] - 1))
    check_that_the_last_record_only_is_lost(path, path.read_bytes()[:cut])


@given(st.data())
def test_a_record_with_a_flipped_bit_is_lost_and_no_other(folder: Path, data: st.DataObject) -> None:
    path = folder / "flipped"
    sizes = fill(path, RECORDS)
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(sizes[-2], sizes[-1] - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check_that_the_last_record_only_is_lost(path, bytes(damaged))


@given(st.integers(1, 200))
def test_zeros_at_the_end_are_no_records(folder: Path, count: int) -> None:
    path = folder / "zeros"
    fill(path, RECORDS[:2])
    check_that_the_last_record_only_is_lost(path, path.read_bytes() + bytes(count))


def test_a_damaged_beginning_is_said(path: Path) -> None:
    sizes = fill(path, RECORDS)
    for damaged in (b"", path.read_bytes()[: sizes[0] - 1], b"x" + path.read_bytes()[1:], bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="beginning is damaged"):
            Journal.reopen(path)


def test_the_way_back_to_the_last_state(whole: Journal) -> None:
    whole.append(record(3))
    whole.append(record(4))
    whole.rewind_to_state()
    assert [found[0] for found in as_tuples(whole)] == [0, 1, 2]
    whole.append(record(9))
    assert [found[0] for found in as_tuples(whole)] == [0, 1, 2, 9]


def test_without_a_state_the_way_back_is_to_the_beginning(path: Path) -> None:
    fill(path, [record(0), record(1)])
    journal = Journal.reopen(path)
    journal.rewind_to_state()
    assert as_tuples(journal) == []
    assert journal.identity == RUN
    journal.close()


def test_a_second_writer_is_refused_and_changes_nothing(whole: Journal, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(JournalBusyError, match="another run"):
        Journal.reopen(path)
    with pytest.raises(JournalBusyError, match="another run"):
        Journal.create(path, {})
    assert path.read_bytes() == before
    whole.close()
    Journal.create(path, RUN).close()
    assert path.stat().st_size < len(before)


def test_a_journal_that_goes_while_it_is_being_opened_is_refused(path: Path) -> None:
    """The other run has finished between our opening of the file and our lock: what we'd write, nobody would find."""
    fill(path, RECORDS)

    def lock_late(file: BinaryIO) -> bool:
        path.unlink()
        return lock(file)

    with pytest.raises(JournalBusyError):
        Journal.reopen(path, lock_late)
