"""What holds for reloaded files whatever is made of them."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from bilm_server.security.reloading import ReloadedFiles

LOG = logging.getLogger("test")


def test_what_failed_for_a_passing_reason_is_tried_again_though_no_file_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path := tmp_path / "file").write_bytes(b"first")
    failures = ["", "no memory", "no memory", ""]

    def make(contents: Sequence[bytes]) -> bytes:
        if failure := failures.pop(0):
            raise ValueError(failure)
        return contents[0]

    files = ReloadedFiles([path], make, LOG)
    assert files.load() == b"first"
    path.write_bytes(b"the second")
    assert [files.current() for _ in range(3)] == [b"first", b"first", b"the second"]
    assert len(caplog.records) == 1


def test_the_value_is_the_same_object_as_long_as_the_content_is_the_same(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_bytes(b"content")
    files = ReloadedFiles([path], lambda _contents: object(), LOG)
    first = files.load()
    path.write_bytes(b"content")
    assert files.current() is first
    path.write_bytes(b"other content")
    assert files.current() is not first


def test_two_changes_that_the_files_clock_cannot_tell_apart(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_bytes(b"first")
    stamp = (1, 2, 3, time.time_ns(), 5)
    files = ReloadedFiles([path], lambda contents: contents[0], LOG, stamp=lambda _path: stamp)
    assert files.load() == b"first"
    path.write_bytes(b"other")
    assert files.current() == b"other"
