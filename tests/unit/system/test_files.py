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


def test_a_private_folder_is_made_closed_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = files.private_folder(tmp_path / "above" / "ours")
    finally:
        os.umask(before)
    assert made == (tmp_path / "above" / "ours").resolve()
    assert [path.stat().st_mode & 0o777 for path in (made, made.parent)] == [0o700, 0o700]
    assert files.private_folder(made) == made


@pytest.mark.parametrize("open_one", ["above", "above/ours"])
def test_a_folder_that_others_can_change_is_not_private(tmp_path: Path, open_one: str) -> None:
    files.private_folder(tmp_path / "above" / "ours")
    (tmp_path / open_one).chmod(0o770)
    with pytest.raises(PermissionError, match="other users can write to it") as caught:
        files.private_folder(tmp_path / "above" / "ours")
    assert caught.value.filename == str((tmp_path / open_one).resolve())


def test_a_sticky_folder_may_stand_above_a_private_one_and_is_none_itself(tmp_path: Path) -> None:
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o1777)
    assert files.private_folder(shared / "ours").is_dir()
    with pytest.raises(PermissionError, match="other users can write to it"):
        files.private_folder(shared)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders to another user")
@pytest.mark.parametrize("foreign", ["above", "above/ours"])
def test_a_folder_of_another_user_is_not_private(tmp_path: Path, foreign: str) -> None:
    files.private_folder(tmp_path / "above" / "ours")
    os.chown(tmp_path / foreign, 65534, -1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        files.private_folder(tmp_path / "above" / "ours")


def test_a_private_folder_cannot_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        files.private_folder(tmp_path / "file" / "ours")
