"""From what a user names to a model: a file, a folder, two files, random weights, or the model that ships."""

from dataclasses import dataclass
from pathlib import Path

from bilm_model import pretrained
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.config import SIZES
from bilm_model.errors import WeightsError
from bilm_model.weights import hdf5, single_file
from bilm_model.weights.options import read_options
from bilm_model.weights.version import content_version

_RANDOM = "random:"
_HDF5_SUFFIXES = {".hdf5", ".h5"}


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


def load(source: str, options: Path | None = None) -> LoadedModel:
    """Loads a model.

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
        return _random(source)
    path = Path(source) if source else pretrained.DEFAULT
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.is_dir():
        return _published(_only(path, "weights.hdf5", ".hdf5"), options or _only(path, "options.json", ".json"), path)
    if path.suffix in _HDF5_SUFFIXES:
        if options is None:
            raise WeightsError(f"{path}: a published weight file needs its options; name them with --options")
        return _published(path, options, path)
    _check_is_file(path)
    config, tensors, version = single_file.read(path)
    return LoadedModel(Bilm.from_tensors(config, tensors), path.stem, version)


def _published(weights: Path, options: Path, source: Path) -> LoadedModel:
    for path in (weights, options):
        _check_is_file(path)
    config = read_options(options)
    tensors = hdf5.read(weights, config)
    return LoadedModel(Bilm.from_tensors(config, tensors), source.stem, content_version(config, tensors))


def _check_is_file(path: Path) -> None:
    """A pipe would be waited for, and a device read for ever."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, or not an ordinary one")


def _only(folder: Path, name: str, suffix: str) -> Path:
    """The file of this name, or the only one that ends so (published files come as elmo_…_weights.hdf5)."""
    if (folder / name).exists():
        return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix == suffix)
    if len(found) != 1:
        raise WeightsError(f"{folder}: expected {name} or one file *{suffix}, found {[path.name for path in found]}")
    return found[0]


def _random(source: str) -> LoadedModel:
    size = source.removeprefix(_RANDOM)
    if size not in SIZES:
        raise WeightsError(f"{source}: expected one of {', '.join(_RANDOM + name for name in SIZES)}")
    bilm = random_bilm(SIZES[size])
    return LoadedModel(bilm, f"random-{size}", content_version(bilm.config, bilm.state_dict()))
