"""Files that people name."""

import errno
import os
from pathlib import Path

import pytest
from bilm_system import files

MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (path := tmp_path / "text").write_bytes(MARK + b"one\r\n" + MARK + b"two")
    assert files.read_text(path) == "one\r\n\ufefftwo"
    assert files.decode_text(b"") == files.decode_text(MARK) == ""
    assert files.text_start(MARK[:2]) == 0


@pytest.mark.parametrize("encoding", ["UTF-16-LE", "UTF-16-BE", "UTF-32-LE", "UTF-32-BE"])
def test_the_mark_of_another_encoding_names_it(encoding: str) -> None:
    order = {"LE": "little-endian", "BE": "big-endian"}[encoding[-2:]]
    with pytest.raises(ValueError, match=f"the text is {encoding[:-3]}, {order}, expected UTF-8"):
        files.decode_text("\ufeffone".encode(encoding))


def test_a_pipe_is_read_where_somebody_writes_into_it(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    os.write(writable, b"content")
    os.close(writable)
    assert files.read_bytes(Path(f"/dev/fd/{readable}")) == b"content"
    os.close(readable)
    os.mkfifo(tmp_path / "pipe")
    assert files.read_bytes(tmp_path / "pipe") == b""  # nobody does, and nobody is waited for


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        files.read_bytes(tmp_path)
    with pytest.raises(OSError, match="a device, expected a file"):
        files.read_bytes(Path("/dev/zero"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_told_from_a_lock(tmp_path: Path, number: int) -> None:
    def failing(number: int) -> None:
        raise OSError(number, os.strerror(number))

    with (tmp_path / "lock").open("wb") as file:
        assert files.lock(file, lambda *_: None)
        assert not files.lock(file, lambda *_: failing(number))
        for held in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            with pytest.raises(BlockingIOError):
                files.lock(file, lambda *_, held=held: failing(held))


def test_one_lock_keeps_another_out(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as file, (tmp_path / "lock").open("wb") as other:
        assert files.lock(file)
        with pytest.raises(BlockingIOError):
            files.lock(other)
