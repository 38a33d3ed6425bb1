"""From what a user names to a model: a file, a folder, two files, random weights, or the model that ships."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from bilm_system.files import message, open_ordinary

from bilm_model import pretrained
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES, BilmConfig
from bilm_model.errors import WeightsError
from bilm_model.weights import hdf5, single_file
from bilm_model.weights.options import read_options
from bilm_model.weights.version import content_version

_RANDOM = "random:"
HDF5_SUFFIXES = (".hdf5", ".h5")
"""Of a published weight file."""


class _Form(Enum):
    SAFETENSORS = "safetensors"
    HDF5 = "HDF5"


_SUFFIXES = {".safetensors": _Form.SAFETENSORS, **dict.fromkeys(HDF5_SUFFIXES, _Form.HDF5)}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A biLM ready to run.

    Attributes:
        bilm: in evaluation mode, float32, on the CPU.
        name: of the file or folder it came from.
        version: see `content_version`.
    """

    bilm: Bilm
    name: str
    version: str


@dataclass(frozen=True)
class ModelHeader:
    """What is known of a model without its weights.

    Attributes:
        name: of the file or folder it comes from.
        config: its structure.
    """

    name: str
    config: BilmConfig

    @property
    def parameter_count(self) -> int:
        """Numbers that it has."""
        with torch.device("meta"):
            return Bilm(self.config).parameter_count


def load(source: str, options: Path | None = None) -> LoadedModel:
    """Load a model.

    Args:
        source: a `.safetensors` file of ours; a folder with a published `options.json` and `weights.hdf5`; a published
            weight file (then `options` names the other); `random:SIZE`, random weights of a named size, for tests and
            benchmarks; or empty, the model that ships.
        options: the published options that go with a published weight file.

    Raises:
        WeightsError: if there is no such thing, or it is damaged.
        ConfigError: if the options describe no biLM.
    """
    if source.startswith(_RANDOM):
        _refuse_options(options, source)
        bilm = random_bilm(_random_config(source))
        return LoadedModel(bilm, _random_name(source), content_version(bilm.config, bilm.state_dict()))
    found = _find(source, options)
    if found.options is not None:
        config = read_options(found.options)
        tensors = hdf5.read(found.weights, config)
        version = content_version(config, tensors)
    else:
        config, tensors, version = single_file.read(found.weights)
    return LoadedModel(Bilm.from_tensors(config, tensors), found.name, version)


def inspect(source: str, options: Path | None = None) -> ModelHeader:
    """Read what a model is, and check its files and shapes, without reading a weight.

    Args:
        source: as for `load`.
        options: likewise.

    Raises:
        WeightsError: as `load` does, except for what the weights hold.
        ConfigError: likewise.
    """
    if source.startswith(_RANDOM):
        _refuse_options(options, source)
        return ModelHeader(_random_name(source), _random_config(source))
    found = _find(source, options)
    if found.options is None:
        return ModelHeader(found.name, single_file.read_config(found.weights))
    config = read_options(found.options)
    hdf5.check(found.weights, config)
    return ModelHeader(found.name, config)


@dataclass(frozen=True)
class _Found:
    """The files of a model.

    Attributes:
        name: of the file or folder that was named.
        weights: one of ours, or a published one.
        options: that go with a published one; None: it is one of ours.
    """

    name: str
    weights: Path
    options: Path | None


def _find(source: str, options: Path | None) -> _Found:
    path = Path(source) if source else pretrained.DEFAULT
    weights = path
    with _naming(path):
        if is_folder := path.is_dir():
            weights = _only(path, "weights.hdf5", ".hdf5")
            options = options or _only(path, "options.json", ".json")
        form = _form(weights)
    if is_folder and form is not _Form.HDF5:
        raise WeightsError(f"{weights}: a .safetensors file, expected HDF5 weights")
    if form is _Form.SAFETENSORS:
        _refuse_options(options, f"{path}, a .safetensors file,")
    elif options is None:
        raise WeightsError(f"{path}: a published weight file needs its options; name them with --options")
    return _Found(_name(path), weights, options)


def _refuse_options(options: Path | None, model: str) -> None:
    if options is not None:
        raise WeightsError(f"options: {options}: {model} has its own; --options goes with HDF5 weights only")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a path into a `WeightsError` of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(f"{error.filename or path}: no such file or folder") from error
    except OSError as error:
        raise WeightsError(message(error)) from error
    except ValueError as error:  # a name that no file can have
        raise WeightsError(f"{str(path)!r}: {error}") from error


def _name(path: Path) -> str:
    """Return the name of a folder, or of a file without the ending that says its form: `elmo_5.5B` ends in no form."""
    name = path.name if path.name.strip(".") else path.resolve().name
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in _SUFFIXES and not path.is_dir() else name


# ---- what a file is, by its content ----------------------------------------------------------------------------------


_HDF5_BEGINNING = b"\x89HDF\r\n\x1a\n"
_HDF5_PLACES = (0, 512, 1024, 2048)  # behind a user block
_OTHERS = (  # what is taken for a model now and then
    (b"PK\x03\x04", "a zip archive, as PyTorch and NumPy write them"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"(\xb5/\xfd", "compressed by zstd"),
    (b"\x80", "a pickle"),
    (b"{", "JSON"),
    (b"version https://git-lfs", "a pointer of Git LFS instead of the file"),
    (b"<", "a page in HTML or XML"),
)
_EXPECTED = "expected a .safetensors file, an HDF5 weight file with --options, or a folder with both of its files"


def _form(path: Path) -> _Form:
    """Find out what a file is by its content, whatever it is called; of one that is damaged, its name tells.

    Raises:
        OSError: It can't be read.
        WeightsError: It is neither of the two.
    """
    with open_ordinary(path) as file:
        head = file.read(_HDF5_PLACES[-1] + len(_HDF5_BEGINNING))
    if any(head.startswith(_HDF5_BEGINNING, place) for place in _HDF5_PLACES):
        return _Form.HDF5
    if head[8:9] == b"{":  # behind the length of its header
        return _Form.SAFETENSORS
    found = next((name for beginning, name in _OTHERS if head.startswith(beginning)), "" if head else "empty")
    by_name = _SUFFIXES.get(path.suffix.lower())
    if found or by_name is None:
        what = found or "of a form that isn't known"
        raise WeightsError(f"{path}: not a readable safetensors file, nor HDF5: {what}; {_EXPECTED}")
    return by_name  # damaged: its reader says how


# ---- the parts of a folder, and random weights -----------------------------------------------------------------------


def _only(folder: Path, name: str, suffix: str) -> Path:
    """Return the file of this name, or the only one that ends so (published files come as elmo_…_weights.hdf5)."""
    if (folder / name).exists():
        return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == suffix)
    if len(found) != 1:
        raise WeightsError(f"{folder}: expected {name} or one file *{suffix}, found {[path.name for path in found]}")
    return found[0]


def _random_config(source: str) -> BilmConfig:
    size = source.removeprefix(_RANDOM)
    if size not in SIZES:
        raise WeightsError(f"{source}: expected one of {', '.join(_RANDOM + name for name in SIZES)}")
    return SIZES[size]


def _random_name(source: str) -> str:
    return source.replace(":", "-")
