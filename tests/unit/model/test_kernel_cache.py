"""Compiled kernels on disk."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bilm_model.kernels import kernel_cache, numba_blocks
from bilm_model.kernels.instruction_levels import LEVELS, level_of
from bilm_model.kernels.kernel_cache import (
    CachedKernels,
    cache_key,
    compiled,
    default_folder,
    keep_in,
    keep_triton_kernels,
    present_level,
    processor,
    shipped_folder,
)
from bilm_model.kernels.machine_code import LoadedKernel, MachineCode, MachineCodeError
from bilm_model.shipped_kernels import BuiltKernels, RecordedKernels
from numba import cfunc, types

ROOT = Path(__file__).parents[3]
SIGNATURE = types.int64(types.int64)
NOBODY = 65534


def add_one(x):  # type: ignore[no-untyped-def]
    return x + 1


def divided(x):  # type: ignore[no-untyped-def]
    return 10 // x  # by Numba's default it raises an exception for 0, so its code holds that path


def compiled_here(store: CachedKernels, function: Any = add_one) -> Any:
    """A function, compiled or from a store."""
    found = compiled(SIGNATURE, {}, function, store=store)
    assert found.ctypes(9) == function(9)
    return found


def is_kept(store: CachedKernels, function: Any = add_one) -> bool:
    return isinstance(compiled_here(store, function), LoadedKernel)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder for kernels."""
    return tmp_path / "cache"


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> CachedKernels:
    return CachedKernels(folder, tmp_path / "none shipped")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("function", [add_one, divided])
def test_what_was_compiled_once_is_loaded(store: CachedKernels, folder: Path, function: Any) -> None:
    assert not is_kept(store, function)
    assert len(files(folder)) == 1
    assert is_kept(store, function)


def test_a_kernel_is_loaded_where_numba_s_compiler_was_never_set_up(store: CachedKernels, folder: Path) -> None:
    compiled_here(store, divided)
    code = (
        "import sys; from pathlib import Path; from numba import types; "
        "from bilm_model.kernels.machine_code import MachineCode; "
        "code = MachineCode.from_bytes(Path(sys.argv[1]).read_bytes()); "
        "print(code.load(types.int64(types.int64)).ctypes(5), 'numba.np.arraymath' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *files(folder)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]


def test_code_that_needs_what_is_not_there_is_not_loaded() -> None:
    code = MachineCode.of(cfunc(SIGNATURE)(add_one))
    with pytest.raises(MachineCodeError, match="it needs no_such_function, which this process doesn't have"):
        MachineCode(code.symbol, ("no_such_function",), code.data).load(SIGNATURE)
    with pytest.raises(MachineCodeError, match="it has no function another"):
        MachineCode("another", (), code.data).load(SIGNATURE)


@pytest.mark.parametrize("damage", ["cut", "a byte", "a page of zeros", "empty"])
def test_a_damaged_file_is_never_loaded(
    store: CachedKernels, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed byte of machine code would end the process, so that no start would succeed any more."""
    compiled_here(store)
    (path,) = files(folder)
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            del content[len(content) // 2 :]
        case "a byte":
            content[len(content) // 2] ^= 1
        case "a page of zeros":
            content[64:4096] = bytes(len(content[64:4096]))
        case "empty":
            content.clear()
    path.write_bytes(content)
    assert not is_kept(store)
    assert f"compiled kernel {path} can't be used, compiling it again: the checksum differs" in caplog.text
    assert is_kept(store)


def test_without_a_folder_to_write_to_it_is_compiled_and_that_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = CachedKernels(tmp_path / "file" / "below")
    assert not is_kept(store)
    assert not is_kept(store)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("compiled kernels are not kept, so each start compiles them: ")


def test_without_a_home_folder_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    assert not is_kept(CachedKernels())
    assert "compiled kernels are not kept" in caplog.text


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_folder_is_made_for_this_user_alone(store: CachedKernels, folder: Path) -> None:
    compiled_here(store)
    assert store.folder == folder
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("above", [False, True])
def test_a_folder_that_others_can_write_to_is_not_used(
    folder: Path, above: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """They could put code, or another folder, in its place at any time."""
    folder.mkdir()
    folder.chmod(0o777)
    store = CachedKernels(folder / "below" if above else folder)
    assert not is_kept(store)
    assert not is_kept(store)
    assert f"{folder}: other users can write to it" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives a folder away")
def test_a_folder_of_another_user_s_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    assert not is_kept(CachedKernels(folder))
    assert f"{folder}: belongs to another user" in caplog.text


@pytest.mark.parametrize(("named", "below"), [("NUMBA_CACHE_DIR", ""), ("XDG_CACHE_HOME", ""), ("HOME", ".cache")])
def test_where_nothing_is_said_it_lies_in_the_user_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, below: str
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(named, str(tmp_path))
    assert default_folder() == tmp_path / below / "bilm-serve"


def test_without_its_source_nothing_is_kept(store: CachedKernels, folder: Path) -> None:
    without = ModuleType("made_at_run_time")
    assert cache_key(add_one, [without]) is None
    assert compiled(SIGNATURE, {}, add_one, without, store=store).ctypes(1) == 2
    assert files(folder) == []


def test_sources_and_processors_have_keys_of_their_own() -> None:
    here, other = processor(), ("x86_64", "another", "", None, None)
    keys = {cache_key(add_one, used, cpu) for used in ([], [numba_blocks], [kernel_cache]) for cpu in (here, other)}
    assert len(keys) == 6
    assert cache_key(add_one, [numba_blocks]) in keys


# ---- kernels that were shipped --------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A folder with a kernel for this processor's level."""
    level = present_level()
    if level is None:
        pytest.skip("needs a processor of a level that kernels are shipped for, and no other named to Numba")
    folder = tmp_path / "shipped"
    folder.mkdir(mode=0o755)
    key = cache_key(add_one, [], (level,))
    assert key is not None
    keep_in(folder, key, cfunc(SIGNATURE)(add_one))
    return folder


def test_a_shipped_kernel_needs_no_folder_of_the_user_s(
    shipped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = CachedKernels(tmp_path / "file" / "below", shipped)
    assert is_kept(store)
    assert caplog.text == ""
    assert not is_kept(store, divided)
    assert "compiled kernels are not kept" in caplog.text


def test_the_user_s_own_kernel_comes_first(shipped: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert is_kept(CachedKernels(folder, shipped))
    assert files(folder) == []
    compiled_here(CachedKernels(folder, folder / "none"))
    for path in files(shipped):
        path.write_bytes(b"damaged")
    assert is_kept(CachedKernels(folder, shipped))
    assert caplog.text == ""


def test_a_damaged_shipped_kernel_is_compiled_and_left_alone(
    shipped: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = files(shipped)
    path.write_bytes(b"damaged")
    assert not is_kept(CachedKernels(folder, shipped))
    assert path.read_bytes() == b"damaged"
    assert f"compiled kernel {path} can't be used" in caplog.text


def test_shipped_kernels_that_others_can_write_to_are_not_used(
    shipped: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped.chmod(0o777)
    assert not is_kept(CachedKernels(folder, shipped))
    assert f"shipped kernels not used: {shipped}: other users can write to it" in caplog.text


@pytest.mark.parametrize(
    ("missing", "level"), [("", "x86-64-v4"), ("avx512vl", "x86-64-v3"), ("avx2", None), ("popcnt", None)]
)
def test_the_level_of_a_processor(missing: str, level: str | None) -> None:
    features = {name: name != missing for name in (*LEVELS[0].features, "avx512bf16")}
    found = level_of(features)
    assert (found.name if found else None) == level


def test_where_numba_is_told_of_another_processor_no_shipped_kernel_is_used() -> None:
    code = "from bilm_model.kernels.kernel_cache import present_level; print(present_level())"
    environment = {**os.environ, **LEVELS[1].environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "None"


def test_what_a_build_records_and_keeps_is_found_as_shipped(tmp_path: Path) -> None:
    level = present_level()
    if level is None:
        pytest.skip("needs a processor of a level that kernels are shipped for, and no other named to Numba")
    recorded, built = RecordedKernels(), BuiltKernels(tmp_path, level)
    for store in (recorded, built):
        assert compiled(SIGNATURE, {}, divided, kernel_cache, store=store).ctypes(5) == 2
    (request,) = recorded.requests
    assert (request.name, request.used) == (f"{__name__}.divided", ("bilm_model.kernels.kernel_cache",))
    assert pickle.loads(pickle.dumps(request)) == request
    assert built.names == {request.name}
    (tmp_path / "file").touch()
    shipped = CachedKernels(tmp_path / "file" / "below", tmp_path)
    assert isinstance(compiled(SIGNATURE, {}, divided, kernel_cache, store=shipped), LoadedKernel)


def test_the_image_has_its_kernels_where_a_server_looks_for_them() -> None:
    below = shipped_folder().relative_to(sys.prefix)
    assert f"/project/opt/bilm/{below}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_build_has_every_kernel_of_a_server_for_each_level(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bilm_model.shipped_kernels", str(tmp_path / "kernels")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(counts) == len(LEVELS)
    assert len(files(tmp_path)) == sum(counts) > 0


# ---- Triton's -------------------------------------------------------------------------------------------------------


def test_triton_keeps_its_kernels_below_the_folder(
    store: CachedKernels, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_triton_kernels(store)
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_triton_kernels(store)
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert (folder / "triton").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TRITON_CACHE_DIR")


def test_triton_is_left_alone_where_there_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    (tmp_path / "file").touch()
    keep_triton_kernels(CachedKernels(tmp_path / "file" / "below"))
    assert "TRITON_CACHE_DIR" not in os.environ
