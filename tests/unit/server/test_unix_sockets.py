"""Whose a Unix socket's path is; the servers are sockets and files here, gRPC's are in integration/test_acceptor.py."""

import logging
import os
import socket
import stat
from pathlib import Path

import grpc
import pytest
from bilm_server.addresses import MAX_PATH_BYTES, socket_path
from bilm_server.protocols.grpc.unix_sockets import UnixSocket


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bilm.sock"


def listening(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(str(path))
    found.listen()
    return found


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208


async def claimed_and_bound(path: Path) -> tuple[UnixSocket, grpc.aio.Server]:
    server, found = grpc.aio.server(), UnixSocket(path)
    found.claim()
    found.bind(server, None)
    return found, server


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("unix:a.sock", "a.sock"),
        ("unix:/run/a.sock", "/run/a.sock"),
        ("unix:///run/a.sock", "/run/a.sock"),
        ("unix:/run/a%20b%25.sock", "/run/a b%.sock"),
    ],
)
def test_the_spellings_of_grpc(target: str, expected: str) -> None:
    assert socket_path(target) == Path(expected)


@pytest.mark.parametrize(
    "target", ["unix:", "unix://", "unix://host/a.sock", "unix:/run/", "unix:/a?b", "unix:/a#b", "unix:/a%00b"]
)
def test_what_is_no_path_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="Unix socket|expected"):
        socket_path(target)


def test_the_longest_path_and_one_byte_more() -> None:
    assert socket_path(f"unix:/{'a' * (MAX_PATH_BYTES - 1)}")
    with pytest.raises(ValueError, match=rf"{MAX_PATH_BYTES} bytes.*found {MAX_PATH_BYTES + 1}"):
        socket_path(f"unix:/{'a' * MAX_PATH_BYTES}")
    with pytest.raises(ValueError, match=f"found {MAX_PATH_BYTES + 1}"):  # the private name has eight
        socket_path(f"unix:/{'a' * (MAX_PATH_BYTES - 9)}/s")


async def test_the_longest_path_can_be_bound(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * (MAX_PATH_BYTES - len(os.fsencode(tmp_path)) - 10))
    folder.mkdir()
    path = folder / "s2345678"
    assert len(os.fsencode(path)) == MAX_PATH_BYTES
    found, server = await claimed_and_bound(socket_path(f"unix:{path}"))
    assert stat.S_ISSOCK(path.stat().st_mode)
    await server.stop(None)
    found.release()
    assert names(folder) == []


def test_a_second_claim_is_refused_until_the_first_ends(path: Path) -> None:
    first, second = UnixSocket(path), UnixSocket(path)
    first.claim()
    first.claim()
    for _ in range(2):
        with pytest.raises(OSError, match="another server listens there"):
            second.claim()
    first.release()
    first.release()
    second.claim()
    second.release()
    assert names(path.parent) == []


def test_a_socket_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with listening(path):
        with pytest.raises(OSError, match="another server listens there"):
            UnixSocket(path).claim()
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_refused_and_left_alone(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(OSError, match="isn't a socket"):
        UnixSocket(path).claim()
    assert names(path.parent) == [path.name]


async def test_a_socket_that_a_killed_process_has_left_is_taken_over(path: Path) -> None:
    listening(path).close()
    path.with_name(path.name + ".lock").touch()
    found, server = await claimed_and_bound(path)
    await server.start()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    await server.stop(None)
    assert names(path.parent) == [path.name, path.name + ".lock"]  # gRPC has unlinked another path
    found.release()
    assert names(path.parent) == []


async def test_a_socket_that_has_taken_the_place_of_ours_is_left_alone(path: Path) -> None:
    found, server = await claimed_and_bound(path)
    os.unlink(path)  # noqa: PTH108
    with listening(path):
        await server.stop(None)
        found.release()
        assert names(path.parent) == [path.name]


def test_a_file_system_without_locks_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = UnixSocket(path, lock=lambda descriptor: False)
    found.claim()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    found.release()
    with listening(path), pytest.raises(OSError, match="another server listens there"):
        UnixSocket(path, lock=lambda descriptor: False).claim()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        UnixSocket(tmp_path / "nowhere" / "s").claim()
    assert error.value.filename == str(tmp_path / "nowhere" / "s.lock")
