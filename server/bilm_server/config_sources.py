"""Where settings come from: flags, the environment (`BILM_…`) and a TOML file, in that order."""

import argparse
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from bilm_system.files import read_text, reason
from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from bilm_server.config import MODEL_NAME, ServerConfig
from bilm_server.errors import ConfigurationError


def load_config(argv: list[str]) -> ServerConfig:
    """Return the settings that flags, environment and TOML file give.

    Raises:
        ConfigurationError: listing every bad value.
        SystemExit: for --help, or a flag that doesn't exist.
    """
    toml, flags = _toml_file(argv), _with_named_models(argv)
    if flags != argv and ("models" in toml or "BILM_MODELS" in os.environ):
        raise ConfigurationError("model: --model NAME=MODEL doesn't go with models in the file or the environment")

    class _Sources(ServerConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            *_unused: Any,
            **_also_unused: Any,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (env_settings, InitSettingsSource(settings_cls, toml))

    try:
        return _Sources(_cli_parse_args=flags)
    except ValidationError as error:
        lines = [f"{_name(item['loc'])}{item['msg']} (found {item['input']!r})" for item in error.errors()]
        raise ConfigurationError("\n".join(line.replace("Value error, ", "") for line in lines)) from error
    except (SettingsError, ValueError) as error:
        raise ConfigurationError(f"environment: {error}") from error


def _toml_file(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get("BILM_CONFIG"))
    name = parser.parse_known_args(argv)[0].config
    if name is None:
        return {}
    try:
        return tomllib.loads(read_text(Path(name)))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"config: {name}: {reason(error)}") from error


def _with_named_models(argv: list[str]) -> list[str]:
    """Return the flags with `--models` in the place of each `--model NAME=MODEL`."""
    parser = argparse.ArgumentParser("bilm-serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--model", action="append", default=[])
    flags, others = parser.parse_known_args(argv)
    named = [re.fullmatch(f"{MODEL_NAME}=(.*)", model, re.DOTALL) for model in flags.model]
    if not any(named):
        return argv
    if not all(named):
        raise ConfigurationError("model: several models need names: --model NAME=MODEL")
    models = [{"name": match[1], "path": match[2]} for match in named if match]
    return [*others, "--model", "", "--models", json.dumps(models)]  # flags come before the environment's BILM_MODEL


def _name(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place)) + ": " if place else ""
