"""From what a user names to a model: a file, a folder, two files, random weights, or the model that ships."""

from dataclasses import dataclass
from pathlib import Path

from bilm_model.bilm import Bilm, random_bilm
from bilm_model.weights import single_file
from bilm_model.weights.finding import RANDOM, find, random_config, random_name, refuse_options
from bilm_model.weights.options import read_options
from bilm_model.weights.version import content_version


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
    if source.startswith(RANDOM):
        refuse_options(options, source)
        bilm = random_bilm(random_config(source))
        return LoadedModel(bilm, random_name(source), content_version(bilm.config, bilm.state_dict()))
    found = find(source, options)
    if found.options is not None:
        config = read_options(found.options)
        from bilm_model.weights import hdf5  # noqa: PLC0415 - most models don't need h5py

        tensors = hdf5.read(found.weights, config)
        version = content_version(config, tensors)
    else:
        config, tensors, version = single_file.read(found.weights)
    return LoadedModel(Bilm.from_tensors(config, tensors), found.name, version)
