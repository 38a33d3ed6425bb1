"""What is checked before the port opens, and without torch: the model's header, the tokenizer's language."""

import logging
import re
from importlib.metadata import PackageNotFoundError

from bilm_model.errors import LanguageError
from bilm_model.tokenization.tokenizers import deferred_tokenizer
from bilm_model.tokenization.types import Tokenizer
from bilm_model.weights.header import inspect

from bilm_server.config import ServerConfig
from bilm_server.errors import ConfigurationError

_log = logging.getLogger(__name__)


def check_model(config: ServerConfig) -> str:
    """Check the model's files and shapes, and that its tokenizer can be had; return the name that it is served under.

    Raises:
        ModelError: if the model can't be served.
        ConfigurationError: if there is no such tokenizer.
    """
    configured_tokenizer(config)
    header = inspect(config.model, config.options)
    name = served_name(config, header.name)
    if not config.served_model_name and name != header.name:
        _log.warning(
            "model name %r has characters that a name can't have, or too many: served as %r", header.name, name
        )
    return name


def served_name(config: ServerConfig, found: str) -> str:
    """Return the name that a model is served under: the configured one, or that of its file or folder made to fit."""
    return config.served_model_name or re.sub(r"[^A-Za-z0-9._-]", "-", found)[:64] or "model"


def configured_tokenizer(config: ServerConfig) -> Tokenizer:
    """Return the tokenizer for raw text; what takes long to load is loaded with the first one, or before.

    Raises:
        ConfigurationError: if it doesn't know the language, or what it needs isn't installed.
    """
    try:
        return deferred_tokenizer(config.tokenizer, config.tokenizer_language)
    except LanguageError as error:
        raise ConfigurationError(f"tokenizer_language: {error}") from error
    except PackageNotFoundError as error:
        raise ConfigurationError(f"tokenizer: {config.tokenizer} needs {error.name}, which isn't installed") from error
