"""What a user names as a model, and what the files there are; reads no weight and loads no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bilm_system.files import message, open_ordinary

from bilm_model import pretrained
from bilm_model.config import SIZES, BilmConfig
from bilm_model.errors import WeightsError

RANDOM = "random:"
"""Begins the name of random weights."""
HDF5_SUFFIXES = (".hdf5", ".h5")
"""Of a published weight file."""


class _Form(Enum):
    SAFETENSORS = "safetensors"
    HDF5 = "HDF5"


_SUFFIXES = {".safetensors": _Form.SAFETENSORS, **dict.fromkeys(HDF5_SUFFIXES, _Form.HDF5)}


@dataclass(frozen=True)
class Found:
    """The files of a model.

    Attributes:
        name: of the file or folder that was named.
        weights: one of ours, or a published one.
        options: that go with a published one; None: it is one of ours.
    """

    name: str
    weights: Path
    options: Path | None


def find(source: str, options: Path | None) -> Found:
    """Return the files of a model that isn't random.

    Args:
        source: a file, a folder, or empty: the model that ships.
        options: that go with a published weight file.

    Raises:
        WeightsError: if there is no such thing, or it is of no form that is known.
    """
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
        refuse_options(options, f"{path}, a .safetensors file,")
    elif options is None:
        raise WeightsError(f"{path}: a published weight file needs its options; name them with --options")
    return Found(_name(path), weights, options)


def refuse_options(options: Path | None, model: str) -> None:
    """Refuse options for a model that has its own.

    Raises:
        WeightsError: if there are any.
    """
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


def random_config(source: str) -> BilmConfig:
    """Return the structure that `random:SIZE` names.

    Raises:
        WeightsError: if there is no such size.
    """
    size = source.removeprefix(RANDOM)
    if size not in SIZES:
        raise WeightsError(f"{source}: expected one of {', '.join(RANDOM + name for name in SIZES)}")
    return SIZES[size]


def random_name(source: str) -> str:
    """Return the name of a model of random weights."""
    return source.replace(":", "-")
