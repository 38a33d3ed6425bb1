"""Model files from strangers: each ends in a clear error, before memory or time goes away, and runs nothing."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES, to_options
from bilm_model.weights import hdf5, single_file
from bilm_model.weights.loading import load
from bilm_model.weights.options import read_options
from bilm_model.weights.safetensors_header import FORMAT
from safetensors.torch import save

from tests.security.fuzz_messages import damage
from tests.support.processes import MIB

# Loads what it is told, in what memory it has when it has loaded the good model, and some more
_WORKER = """
import json, resource, sys
from pathlib import Path
from bilm_model.errors import ModelError
from bilm_model.weights.loading import load

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

good, room = sys.argv[1], int(sys.argv[2])
load(good)
resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + room, resource.RLIM_INFINITY))
print("ready", flush=True)
for line in sys.stdin:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmHWM")
    try:
        load(*[Path(part) if i else part for i, part in enumerate(json.loads(line))])
        outcome = "loaded", ""
    except ModelError as error:
        outcome = "refused", str(error)
    except BaseException as error:
        outcome = type(error).__name__, str(error)
    print(json.dumps([*outcome, memory("VmHWM") - before]), flush=True)
"""
_ROOM_BYTES = 1024 * MIB
# What a refusal may cost: the file's own size, and the reader's noise
_MAX_GROWTH_BYTES = 64 * MIB
_TINY = SIZES["tiny"]


class Loader:
    """A process that loads models; one that dies is a finding."""

    def __init__(self, good: Path) -> None:
        arguments = [sys.executable, "-c", _WORKER, str(good), str(_ROOM_BYTES)]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def load(self, *source: Path) -> tuple[str, str]:
        """What came of it: "loaded", "refused" or the name of another exception; and its message."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(part) for part in source]) + "\n")
        self._process.stdin.flush()
        outcome, message, growth_bytes = json.loads(self._line())
        assert growth_bytes < _MAX_GROWTH_BYTES, f"{growth_bytes / MIB:.0f} MiB to say {outcome}: {message}"
        return outcome, message

    def stop(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process died with exit code {self._process.wait()}"
        return line.strip()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of published files, and a single file beside them."""
    folder = tmp_path_factory.mktemp("good") / "model"
    folder.mkdir()
    tensors = random_bilm(_TINY).state_dict()
    hdf5.write(folder / "weights.hdf5", _TINY, tensors)
    (folder / "options.json").write_text(json.dumps(to_options(_TINY)), encoding="utf-8")
    single_file.write(folder.with_name("model.safetensors"), _TINY, tensors)
    return folder


@pytest.fixture(scope="module")
def loader(good: Path) -> Iterator[Loader]:
    loader = Loader(good)
    yield loader
    loader.stop()


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "model"))


# ---- published weights ----

KEY = "CNN/b_cnn_0"
SHAPE = (8,)


def _external_link(file: h5py.File) -> None:
    file[KEY] = h5py.ExternalLink("/dev/zero", "/x")


def _soft_link(file: h5py.File) -> None:
    file[KEY] = h5py.SoftLink("/CNN/b_cnn_1")


def _linked_group(file: h5py.File) -> None:
    file.move("CNN", "elsewhere")
    file["CNN"] = h5py.SoftLink("/elsewhere")


def _external_storage(file: h5py.File) -> None:
    file.create_dataset(KEY, SHAPE, "f4", external=[("/etc/passwd", 0, 32)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[:] = h5py.VirtualSource(".", "CNN/b_cnn_1", SHAPE)
    file.create_virtual_dataset(KEY, layout)


def _huge_chunk(file: h5py.File) -> None:
    dataset = file.create_dataset(KEY, SHAPE, "f4", chunks=(2**29,), maxshape=(None,), compression="gzip")
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(MIB)))


def _compression_bomb(file: h5py.File) -> None:
    dataset = file.create_dataset(KEY, SHAPE, "f4", chunks=SHAPE, compression="gzip")
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(128 * MIB)))


def _never_written(file: h5py.File) -> None:
    file.create_dataset(KEY, SHAPE, "f4")


def _infinite(file: h5py.File) -> None:
    file[KEY] = np.full(SHAPE, np.inf, np.float32)


def _infinite_as_float32(file: h5py.File) -> None:
    file[KEY] = np.full(SHAPE, 1e300)


def _of_strings(file: h5py.File) -> None:
    file[KEY] = ["x"] * SHAPE[0]


def _of_references(file: h5py.File) -> None:
    file.create_dataset(KEY, SHAPE, h5py.ref_dtype)


def _scalar(file: h5py.File) -> None:
    file[KEY] = np.float32(0)


def _group_instead(file: h5py.File) -> None:
    file.create_group(KEY)


def _named_type_instead(file: h5py.File) -> None:
    file[KEY] = np.dtype("f4")


def _deep(file: h5py.File) -> None:
    file[KEY] = np.zeros(SHAPE, np.float32)
    group = file["CNN"]
    for _ in range(2000):
        group = group.create_group("g")


def _in_circles(file: h5py.File) -> None:
    file[KEY] = np.zeros(SHAPE, np.float32)
    file["CNN/again"] = file["CNN"]


def _crowded(file: h5py.File) -> None:
    file[KEY] = np.zeros(SHAPE, np.float32)
    for i in range(10_100):
        file[f"CNN_proj/x{i}"] = h5py.SoftLink("/nowhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_external_link, "CNN/b_cnn_0: a link to elsewhere"),
        (_soft_link, "CNN/b_cnn_0: a link to elsewhere"),
        (_linked_group, "CNN: a link to elsewhere"),
        (_external_storage, "CNN/b_cnn_0: stored in pieces, compressed or outside"),
        (_virtual, "CNN/b_cnn_0: stored in pieces, compressed or outside"),
        (_huge_chunk, "CNN/b_cnn_0: stored in pieces, compressed or outside"),
        (_compression_bomb, "CNN/b_cnn_0: stored in pieces, compressed or outside"),
        (_never_written, "CNN/b_cnn_0: expected 32 bytes in the file, found 0"),
        (_infinite, "CNN/b_cnn_0: holds values that are not finite"),
        (_infinite_as_float32, "CNN/b_cnn_0: holds values that are not finite"),
        (_of_strings, "CNN/b_cnn_0: expected floating-point numbers"),
        (_of_references, "CNN/b_cnn_0: expected floating-point numbers"),
        (_scalar, r"CNN/b_cnn_0: expected shape (8,), found ()"),
        (_group_instead, "CNN/b_cnn_0: missing"),
        (_named_type_instead, "CNN/b_cnn_0: "),
        (_deep, "too many objects, or too deep"),
        (_in_circles, "too many objects, or too deep"),
        (_crowded, "CNN_proj"),
    ],
)
def test_published_weights(spoil: Callable[[h5py.File], None], message: str, folder: Path, loader: Loader) -> None:
    with h5py.File(folder / "weights.hdf5", "r+") as file:
        del file[KEY]
        spoil(file)
    outcome, found = loader.load(folder)
    assert (outcome, message in found) == ("refused", True), found


def test_a_tiny_file_of_huge_shapes(folder: Path, loader: Loader) -> None:
    """The options and the file agree on shapes of gigabytes, but the numbers aren't there."""
    options = to_options(_TINY)
    options["lstm"].update(dim=2**13, projection_dim=2**11)
    (folder / "options.json").write_text(json.dumps(options), encoding="utf-8")
    config = read_options(folder / "options.json")
    with h5py.File(folder / "weights.hdf5", "w") as file:
        shapes = Bilm.parameter_shapes(config)
        for key, name, axes in hdf5.names(config):
            file.create_dataset(key, axes.stored_shape(hdf5._joined_shape(shapes, name)), "f4")
    outcome, found = loader.load(folder)
    assert outcome == "refused"
    assert "bytes in the file, found 0" in found


# ---- options ----


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _options(**changes: Any) -> str:
    options = to_options(_TINY)
    for key, value in changes.items():
        section = options["char_cnn" if key in options["char_cnn"] else "lstm"]
        section[key] = value
    return json.dumps(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        (_nested(30_000), "recursion"),
        ('{"lstm": ' + _nested(30_000) + "}", "recursion"),
        (_options().replace("32", "9" * 5000, 1), "digits"),
        (_options(n_layers=10**400), "too large"),
        (_options(n_layers=10**9), "lstm.n_layers: expected at most 64"),
        (_options(n_highway=10**9), "char_cnn.n_highway: expected at most 64"),
        (_options(filters=[[1, 1]] * 5000), "char_cnn.filters: expected at most 64"),
        (_options(dim=10**9), "parameters, more than"),
        (_options(dim=2**62, projection_dim=2**62), "parameters, more than"),
        (_options(filters=[[1, 10**7]]), "parameters, more than"),
        (_options(embedding={"dim": 10**12}), "parameters, more than"),
        (_options(filters=[[float("inf"), 1]]), "infinity"),
        (_options(filters=[["1"] * 3]), "char_cnn.filters"),
        (_options(filters={"a": 1}), "char_cnn.filters"),
        (_options(cell_clip=float("nan")), "cell_clip"),
        (_options(activation=["relu"]), "activation"),
        (_options(activation="x" * 40_000), "activation"),
        (_options(residual={}), "lstm.residual"),
        (" " * 70_000, "more than 65536 bytes"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "Expecting value"),
    ],
)
def test_options(text: str, message: str, folder: Path, loader: Loader) -> None:
    """The same in a file of their own and in a safetensors file."""
    (folder / "options.json").write_text(text, encoding="utf-8")
    outcome, found = loader.load(folder)
    assert (outcome, message in found) == ("refused", True), found
    assert len(found) < 1000
    path = folder.with_name("model.safetensors")
    path.write_bytes(save({}, metadata={"format": FORMAT, "options": text, "version": "0"}))
    outcome, found = loader.load(path)
    assert outcome == "refused", found
    assert len(found) < 1000


# ---- our own file ----


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable safetensors file"),
        (b"\x80", "not a readable safetensors file"),
        (pickle.dumps({"x": 1}), "not a readable safetensors file"),
        (_file(b" " * (100 * 10**6)), "a header of 100000000 bytes"),
        (_file({}, length=2**64 - 1), "a header of 18446744073709551615 bytes"),
        (_file({}, length=2**20), "not a readable safetensors file"),
        (_file(_nested(100_000).encode()), "not a readable safetensors file"),
        (_file(b"\xff\xfe{}"), "not a readable safetensors file"),
        (_file(_entry(), bytes(7)), "not a readable safetensors file"),
        (_file(_entry(data_offsets=[0, 2**63]), bytes(8)), "not a readable safetensors file"),
        (_file(_entry(data_offsets=[8, 0]), bytes(8)), "not a readable safetensors file"),
        (_file(_entry(data_offsets=[2**64 - 8, 2**64 - 1]), bytes(8)), "not a readable safetensors file"),
        (_file(_entry(shape=[2**32, 2**32]), bytes(8)), "not a readable safetensors file"),
        (_file(_entry(shape=[2**62, 4, 0], data_offsets=[0, 0])), ""),
        (_file(_entry(dtype="PICKLE"), bytes(8)), "not a readable safetensors file"),
        (_file({"__metadata__": {"format": 7}, **_entry()}, bytes(8)), "not a readable safetensors file"),
        (_file(_entry(), bytes(8)), "metadata format: missing"),
    ],
)
def test_our_file(content: bytes, message: str, tmp_path: Path, loader: Loader) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    outcome, found = loader.load(path)
    assert (outcome, message in found) == ("refused", True), found


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_number_formats_of_our_file(dtype: torch.dtype, good: Path, tmp_path: Path, loader: Loader) -> None:
    tensors = random_bilm(_TINY).state_dict()
    tensors["encoder.projection.bias"] = tensors["encoder.projection.bias"].to(dtype)
    metadata = {"format": FORMAT, "options": json.dumps(to_options(_TINY)), "version": "0"}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, metadata=metadata))
    outcome, found = loader.load(path)
    assert (outcome, "expected float32 or float16" in found) == ("refused", True), found


class _Payload:
    """Runs something when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._trace),)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin", "model"])
def test_pickles_are_not_opened(name: str, tmp_path: Path, loader: Loader) -> None:
    trace, path = tmp_path / "trace", tmp_path / name
    torch.save({"x": _Payload(trace)}, path)
    assert loader.load(path)[0] == "refused"
    path.write_bytes(pickle.dumps(_Payload(trace)))
    assert loader.load(path)[0] == "refused"
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # the payload would have worked


# ---- files of any kind ----


@pytest.mark.parametrize("name", ["weights.hdf5", "options.json"])
def test_what_is_no_ordinary_file(name: str, folder: Path, loader: Loader) -> None:
    """A pipe would be waited for, a device read for ever."""
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink()
        make(folder / name)
        assert loader.load(folder)[0] == "refused"
        if (folder / name).is_dir():
            (folder / name).rmdir()
            (folder / name).touch()
    os.mkfifo(folder / "pipe.safetensors")
    assert loader.load(folder / "pipe.safetensors")[0] == "refused"


def _mutations(path: Path, out: Path, n: int, seed: int) -> Iterator[Path]:
    """Damaged copies; half of the damage in the first 4 KiB, where the structure is."""
    data = path.read_bytes()
    for i in range(n):
        rng = random.Random(f"{seed}:{path.name}:{i}")
        cut = rng.choice((len(data), 4096))
        found = data
        for _ in range(rng.choice((1, 1, 3, 10))):
            found = damage(rng, found[:cut]) + found[cut:]
        out.write_bytes(found)
        yield out


@pytest.mark.parametrize("name", ["weights.hdf5", "options.json", "model.safetensors"])
@pytest.mark.parametrize("n", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_files(name: str, n: int, good: Path, folder: Path, loader: Loader) -> None:
    single = name.endswith(".safetensors")
    original = good.with_name(name) if single else good / name
    outcomes = [loader.load(path if single else folder) for path in _mutations(original, folder / name, n, seed=1)]
    assert {outcome for outcome, _ in outcomes} <= {"loaded", "refused"}, outcomes
    assert sum(outcome == "refused" for outcome, _ in outcomes) > n // 10


def test_a_file_that_changes_under_a_loaded_model(good: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(good.with_name("model.safetensors"), tmp_path / "model.safetensors"))
    loaded = load(str(path))
    with path.open("r+b") as file:
        file.truncate(0)
    expected = load(str(good)).bilm.state_dict()
    for name, tensor in loaded.bilm.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_bad_model_ends_the_server_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_file(b" " * 2 * MIB))
    command = [sys.executable, "-m", "bilm_server", "--model", str(path), "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"bilm-serve: {path}: not a readable safetensors file")
    assert "Traceback" not in done.stderr
