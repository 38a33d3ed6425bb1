"""Compiled kernels on disk."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bilm_model.kernels import kernel_cache, numba_blocks
from bilm_model.kernels.kernel_cache import cache_folder, cache_key, compiled, processor
from numba import types


def add_one(x):  # type: ignore[no-untyped-def]
    return x + 1


def compiled_here() -> Any:
    """A function, compiled or from the cache."""
    function = compiled(types.int64(types.int64), {}, add_one)
    assert function.ctypes(41) == 42
    return function


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for all caches."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_was_compiled_once_is_read(folder: Path) -> None:
    assert compiled_here().cache_hits == 0
    assert files(folder)
    assert compiled_here().cache_hits == 1


@pytest.mark.parametrize("damage", ["cut", "a byte", "a page of zeros", "gone"])
@pytest.mark.parametrize("suffix", [".nbc", ".nbi"])
def test_a_damaged_file_is_never_read(folder: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A changed byte of machine code would end the process, so that no start would succeed any more."""
    compiled_here()
    (path,) = (path for path in files(folder) if path.suffix == suffix)
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            del content[20:]
        case "a byte":
            content[len(content) // 2] ^= 1
        case "a page of zeros":
            content[64:4096] = bytes(len(content[64:4096]))
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    assert compiled_here().cache_hits == 0
    assert "is damaged: removed, compiling it again" in caplog.text
    assert compiled_here().cache_hits == 1


def test_what_was_not_written_to_its_end_is_compiled_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled_here()
    (path,) = (path for path in files(folder) if path.name == "checksum")
    path.unlink()
    assert compiled_here().cache_hits == 0
    assert compiled_here().cache_hits == 1
    assert caplog.text == ""


def test_without_a_folder_to_write_to_it_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert cache_folder("key") is None
    assert compiled_here().cache_hits == compiled_here().cache_hits == 0


def test_a_folder_that_others_can_write_to_is_not_used(folder: Path) -> None:
    found = cache_folder("key")
    assert found == folder / "bilm-serve-kernels" / "key"
    assert found.stat().st_mode & 0o777 == 0o700
    found.chmod(0o770)
    assert cache_folder("key") is None


def test_nothing_is_read_from_below_a_folder_that_others_can_write_to(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They could put another folder in the place of ours at any time."""
    folder.mkdir()
    folder.chmod(0o777)
    with caplog.at_level("INFO"):
        assert compiled_here().cache_hits == compiled_here().cache_hits == 0
    assert f"{folder}: other users can write to it" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("named", "below"), [("XDG_CACHE_HOME", ""), ("HOME", ".cache")])
def test_where_nothing_is_said_it_lies_in_the_user_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, below: str
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(named, str(tmp_path))
    assert cache_folder("key") == tmp_path / below / "bilm-serve-kernels" / "key"


def test_without_its_source_nothing_is_kept(folder: Path) -> None:
    without = ModuleType("made_at_run_time")
    assert cache_key(add_one, [without]) is None
    assert compiled(types.int64(types.int64), {}, add_one, without).ctypes(1) == 2
    assert not folder.exists()


def test_sources_and_processors_have_folders_of_their_own() -> None:
    here, other = processor(), ("x86_64", "another", "", None, None)
    keys = {cache_key(add_one, used, cpu) for used in ([], [numba_blocks], [kernel_cache]) for cpu in (here, other)}
    assert len(keys) == 6
    assert cache_key(add_one, [numba_blocks]) in keys
