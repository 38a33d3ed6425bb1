"""The parameters of a biLM by their names in `Bilm`, from the structure alone: checked without loading torch."""

from collections.abc import Iterator, Mapping
from math import prod

from bilm_model.alphabet import CHARACTER_COUNT
from bilm_model.config import BilmConfig

Shapes = Mapping[str, tuple[int, ...]]


def parameter_shapes(config: BilmConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order of `Bilm.named_parameters`."""
    return {name: shape for parts in (_encoder(config), _directions(config)) for name, shape in parts}


def parameter_count(config: BilmConfig) -> int:
    """Return the size as papers count it, as `Bilm.parameter_count` does: without the row of "no token here"."""
    return sum(prod(shape) for shape in parameter_shapes(config).values()) - config.char_dim


_Parameters = Iterator[tuple[str, tuple[int, ...]]]


def _encoder(config: BilmConfig) -> _Parameters:
    if config.has_cnn_projection:
        yield "encoder.projection.weight", (config.projection_dim, config.n_filters)
        yield "encoder.projection.bias", (config.projection_dim,)
    yield "encoder.char_cnn.embedding", (CHARACTER_COUNT, config.char_dim)
    for k, (width, count) in enumerate(config.filters):
        yield f"encoder.char_cnn.kernels.{k}", (count, config.char_dim, width)
    for k, (_, count) in enumerate(config.filters):
        yield f"encoder.char_cnn.biases.{k}", (count,)
    for k in range(config.n_highway):
        for part in ("gate", "transform"):
            yield f"encoder.highways.{k}.{part}.weight", (config.n_filters, config.n_filters)
            yield f"encoder.highways.{k}.{part}.bias", (config.n_filters,)


def _directions(config: BilmConfig) -> _Parameters:
    n_gates, projection = 4 * config.cell_dim, config.projection_dim
    for d in range(2):
        for k in range(config.n_layers):
            layer = f"directions.{d}.layers.{k}"
            yield f"{layer}.input.weight", (n_gates, projection)
            yield f"{layer}.input.bias", (n_gates,)
            yield f"{layer}.recurrent.weight", (n_gates, projection)
            if config.has_lstm_projection:
                yield f"{layer}.projection.weight", (projection, config.cell_dim)
