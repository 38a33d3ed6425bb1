"""What a biLM looks like: structure is configuration, not code.

The options are the published ones (`options.json` of AllenNLP and bilm-tf), read and written as they are; a name of
ours for each stands in `BilmConfig`. One key is ours, `lstm.residual`, for what the published ones can't say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bilm_model.alphabet import CHARACTER_COUNT, MAX_CHARACTERS
from bilm_model.errors import ConfigError

Activation = Literal["relu", "tanh"]
Residual = Literal["published", "input_to_input", "none"]

# While training, published options count 261 characters: without id 0, which stands for 'no token here'.
_TRAINING_CHARACTER_COUNT = CHARACTER_COUNT - 1


@dataclass(frozen=True)
class BilmConfig:
    """The structure of a biLM.

    Attributes:
        char_dim: size of a character's embedding.
        filters: (width in characters, number of filters) for each convolution, in the order of the file.
        activation: after the convolutions' maximum, "relu" or "tanh".
        n_highway: highway layers over the filters.
        projection_dim: size of a direction's output; a token's vector is twice as wide.
        cell_dim: size of the LSTM cells (`lstm.dim` in the options).
        n_layers: LSTM layers of each direction.
        cell_clip: bound of the cells' absolute value.
        proj_clip: bound of the projected outputs' absolute value.
        residual: what skips an LSTM layer. "published": each layer after the first adds its input to its output; the
            sum is what is returned and what the next layer reads. "input_to_input": each layer's output is returned as
            it is, and its input is added to what the next layer reads. "none": nothing. A layer's recurrence never
            sees a sum.

    Raises:
        ConfigError: on creation, if a value describes no biLM.
    """

    char_dim: int
    filters: tuple[tuple[int, int], ...]
    projection_dim: int
    cell_dim: int
    activation: Activation = "relu"
    n_highway: int = 1
    n_layers: int = 2
    cell_clip: float = 3.0
    proj_clip: float = 3.0
    residual: Residual = "published"

    def __post_init__(self) -> None:
        for name in ("char_dim", "projection_dim", "cell_dim", "n_layers"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check(self.n_highway >= 0, "n_highway", "at least 0", self.n_highway)
        _check(len(self.filters) >= 1, "filters", "at least one", self.filters)
        for width, count in self.filters:
            _check(1 <= width <= MAX_CHARACTERS, "filters", f"widths from 1 to {MAX_CHARACTERS}", width)
            _check(count >= 1, "filters", "counts of at least 1", count)
        _check(self.activation in get_args(Activation), "activation", f"one of {get_args(Activation)}", self.activation)
        _check(self.residual in get_args(Residual), "residual", f"one of {get_args(Residual)}", self.residual)
        # bilm-tf then projects nothing, and the token layer and the LSTM layers, of other widths, can't be stacked
        _check(
            self.projection_dim <= self.cell_dim,
            "projection_dim",
            f"at most {self.cell_dim} (dim)",
            self.projection_dim,
        )
        for name in ("cell_clip", "proj_clip"):
            _check(0 < getattr(self, name) < float("inf"), name, "a positive number", getattr(self, name))

    @property
    def n_filters(self) -> int:
        """Filters of all widths together: the size of a token between the convolutions and the projection."""
        return sum(count for _, count in self.filters)

    @property
    def has_cnn_projection(self) -> bool:
        """Whether a projection follows the highways: bilm-tf leaves it out where it would keep the size."""
        return self.n_filters != self.projection_dim

    @property
    def has_lstm_projection(self) -> bool:
        """Whether the cells' output is projected: bilm-tf leaves it out where it would keep the size."""
        return self.projection_dim < self.cell_dim

    @property
    def width(self) -> int:
        """Components of a token's vector: both directions."""
        return 2 * self.projection_dim

    @property
    def layer_count(self) -> int:
        """Layers that are returned: the token layer and one for each LSTM layer."""
        return self.n_layers + 1


def _check(good: bool, key: str, expected: str, found: object) -> None:
    if not good:
        raise ConfigError(f"{key}: expected {expected}, found {found!r}")


_PUBLISHED_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))

SIZES = {
    # for tests and examples: starts at once
    "tiny": BilmConfig(char_dim=4, filters=((1, 8), (2, 8), (3, 16)), cell_dim=32, projection_dim=8),
    # the published models
    "small": BilmConfig(char_dim=16, filters=_PUBLISHED_FILTERS, cell_dim=1024, projection_dim=128),
    "medium": BilmConfig(char_dim=16, filters=_PUBLISHED_FILTERS, cell_dim=2048, projection_dim=256),
    "original": BilmConfig(char_dim=16, filters=_PUBLISHED_FILTERS, cell_dim=4096, projection_dim=512, n_highway=2),
}
"""The named sizes."""

# ---- the published options ----------------------------------------------------------------------------------------


def from_options(options: Mapping[str, Any]) -> BilmConfig:
    """Read published options (the content of an `options.json`).

    Raises:
        ConfigError: if a key is missing or has a value that can't be served; the message names it.
    """
    lstm, cnn = _section(options, "lstm"), _section(options, "char_cnn")
    n_characters = _integer(cnn, "char_cnn.n_characters")
    _check(
        n_characters in (CHARACTER_COUNT, _TRAINING_CHARACTER_COUNT),
        "char_cnn.n_characters",
        f"{CHARACTER_COUNT} (or {_TRAINING_CHARACTER_COUNT} while training)",
        n_characters,
    )
    max_characters = _integer(cnn, "char_cnn.max_characters_per_token")
    _check(max_characters == MAX_CHARACTERS, "char_cnn.max_characters_per_token", str(MAX_CHARACTERS), max_characters)
    return BilmConfig(
        char_dim=_integer(_section(cnn, "embedding", "char_cnn."), "char_cnn.embedding.dim"),
        filters=_filters(_value(cnn, "char_cnn.filters")),
        activation=_value(cnn, "char_cnn.activation"),
        n_highway=_integer(cnn, "char_cnn.n_highway"),
        projection_dim=_integer(lstm, "lstm.projection_dim"),
        cell_dim=_integer(lstm, "lstm.dim"),
        n_layers=_integer(lstm, "lstm.n_layers"),
        cell_clip=_float(lstm, "lstm.cell_clip"),
        proj_clip=_float(lstm, "lstm.proj_clip"),
        residual=_residual(lstm),
    )


def to_options(config: BilmConfig) -> dict[str, Any]:
    """Write published options: what `from_options` reads.

    `lstm.residual` is there for "input_to_input" only: what the published options can say is said by them alone, and
    such models keep their version, which is a hash of the options, too.
    """
    return {
        "lstm": {
            **({"residual": config.residual} if config.residual == "input_to_input" else {}),
            "use_skip_connections": config.residual == "published",
            "projection_dim": config.projection_dim,
            "cell_clip": config.cell_clip,
            "proj_clip": config.proj_clip,
            "dim": config.cell_dim,
            "n_layers": config.n_layers,
        },
        "char_cnn": {
            "activation": config.activation,
            "filters": [list(pair) for pair in config.filters],
            "n_highway": config.n_highway,
            "embedding": {"dim": config.char_dim},
            "n_characters": CHARACTER_COUNT,
            "max_characters_per_token": MAX_CHARACTERS,
        },
    }


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected an object, found {value!r}")
    return value


def _value(section: Mapping[str, Any], key: str) -> Any:
    name = key.rpartition(".")[2]
    if name not in section:
        raise ConfigError(f"{key}: missing")
    return section[name]


def _section(options: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    return _mapping(_value(options, prefix + name), prefix + name)


def _float(section: Mapping[str, Any], key: str) -> float:
    value = _value(section, key)
    # To Python, a bool is an int; to the options' author it isn't
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}: expected a number, found {value!r}")
    return float(value)


def _integer(section: Mapping[str, Any], key: str) -> int:
    value = _float(section, key)
    if not value.is_integer():
        raise ConfigError(f"{key}: expected a whole number, found {value!r}")
    return int(value)


def _boolean(section: Mapping[str, Any], key: str) -> bool:
    value = _value(section, key)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: expected true or false, found {value!r}")
    return value


def _residual(lstm: Mapping[str, Any]) -> Residual:
    skips = _boolean(lstm, "lstm.use_skip_connections")
    residual: Residual = lstm.get("residual", "published" if skips else "none")
    _check(residual in get_args(Residual), "lstm.residual", f"one of {get_args(Residual)}", residual)
    expected = residual == "published"
    _check(
        skips == expected,
        "lstm.use_skip_connections",
        f"{str(expected).lower()} beside lstm.residual {residual!r}",
        skips,
    )
    return residual


def _filters(value: object) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(width), int(count)) for width, count in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"char_cnn.filters: expected a list of [width, count], found {value!r}") from error
