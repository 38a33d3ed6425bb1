"""Options from an untrusted file: read within bounds, so that they can't ask for memory or time.

Everything is refused before anything is built: a layer that is only described costs a few bytes of JSON.
"""

import json
from pathlib import Path
from typing import Any

from bilm_system.files import decode_text, open_ordinary, reason

from bilm_model.alphabet import CHARACTER_COUNT
from bilm_model.config import BilmConfig, from_options
from bilm_model.errors import ConfigError

MAX_OPTIONS_BYTES = 2**16
"""Published options have less than 1 KiB."""
MAX_PARAMETERS = 2**30
"""4 GiB in float32; the largest published model has 94 million."""
MAX_PARTS = 64
"""LSTM layers, highway layers, or convolutions; published models have 2, 2 and 7."""

# A refused value is quoted, but it may be as long as the file
_MAX_MESSAGE_LENGTH = 500


def read_options(path: Path) -> BilmConfig:
    """Read an `options.json`.

    Raises:
        ConfigError: if the file can't be read, is too large, isn't JSON, or describes no biLM or one beyond bounds.
    """
    try:
        with open_ordinary(path) as file:
            data = file.read(MAX_OPTIONS_BYTES + 1)
        if len(data) > MAX_OPTIONS_BYTES:
            raise ConfigError(f"more than {MAX_OPTIONS_BYTES} bytes")
        return parse_options(decode_text(data))
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{path}: {reason(error)}") from error


def parse_options(text: str) -> BilmConfig:
    """Read the text of an `options.json`.

    Raises:
        ConfigError: if it isn't JSON, or describes no biLM or one beyond bounds.
    """
    try:
        options: Any = json.loads(text)
        if not isinstance(options, dict):
            raise ConfigError("expected an object")
        config = from_options(options)
    # Beside what is no JSON (a ValueError): nested too deeply, or numbers beyond what Python reads or converts
    except (ConfigError, RecursionError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(str(error)[:_MAX_MESSAGE_LENGTH]) from error
    check_size(config)
    return config


def check_size(config: BilmConfig) -> None:
    """Make sure that such a biLM can be built.

    Raises:
        ConfigError: if it has too many parts or parameters.
    """
    parts = {"lstm.n_layers": config.n_layers, "char_cnn.n_highway": config.n_highway}
    for key, found in {**parts, "char_cnn.filters": len(config.filters)}.items():
        if found > MAX_PARTS:
            raise ConfigError(f"{key}: expected at most {MAX_PARTS}, found {found}")
    found = _parameter_count(config)
    if found > MAX_PARAMETERS:
        raise ConfigError(f"the options describe {found:.3g} parameters, more than {MAX_PARAMETERS:,}")


def _parameter_count(config: BilmConfig) -> int:
    """About as many as `Bilm` has, from the options alone: its largest matrices."""
    cell, projection, filters = config.cell_dim, config.projection_dim, config.n_filters
    lstm = 2 * config.n_layers * (4 * cell * (2 * projection + 1) + cell * projection)
    cnn = config.char_dim * (CHARACTER_COUNT + sum(width * count for width, count in config.filters))
    return lstm + cnn + 2 * config.n_highway * filters * (filters + 1) + filters * projection
