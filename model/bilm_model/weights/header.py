"""What a model is, without its weights: read before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path

from bilm_model.config import BilmConfig
from bilm_model.weights import safetensors_header
from bilm_model.weights.finding import RANDOM, find, random_config, random_name, refuse_options
from bilm_model.weights.options import read_options
from bilm_model.weights.shapes import parameter_count


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
        return parameter_count(self.config)


def inspect(source: str, options: Path | None = None) -> ModelHeader:
    """Read what a model is, and check its files and shapes, without reading a weight.

    Args:
        source: as for `loading.load`.
        options: as for `loading.load`.

    Raises:
        WeightsError: as `loading.load` does, except for what the weights hold.
        ConfigError: as `loading.load` does.
    """
    if source.startswith(RANDOM):
        refuse_options(options, source)
        return ModelHeader(random_name(source), random_config(source))
    found = find(source, options)
    if found.options is None:
        return ModelHeader(found.name, safetensors_header.read_config(found.weights))
    config = read_options(found.options)
    from bilm_model.weights import hdf5  # noqa: PLC0415 - NumPy and h5py take their time, and most models need neither

    hdf5.check(found.weights, config)
    return ModelHeader(found.name, config)
