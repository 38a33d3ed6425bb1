"""A command's settings: the same by flag, by environment and by a TOML file, in that order."""

import argparse
import os
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import grpc
from bilm_system.files import read_text, reason
from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from bilm_client._core.balancing import check_server_name
from bilm_client.cli.credentials import CredentialsError, channel_credentials, read_token

S = TypeVar("S", bound=BaseSettings)


class UsageError(Exception):
    """Bad settings; the message has one a line."""


def load_command_settings(cls: type[S], argv: list[str]) -> S:
    """Read flags, environment and TOML file.

    Args:
        cls: The settings; the environment variable of the file is its `env_prefix` with CONFIG behind it.
        argv: The flags.

    Raises:
        UsageError: A value is bad; the message lists all of them.
        SystemExit: There is --help, or a flag that doesn't exist.
    """
    toml = _toml(argv, f"{cls.model_config['env_prefix']}CONFIG")

    class _CommandSources(cls):  # type: ignore[misc, valid-type]
        __doc__ = cls.__doc__

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
        settings: S = _CommandSources(_cli_parse_args=argv)
    except ValidationError as error:
        raise UsageError("\n".join(map(_line, error.errors()))) from error
    except (SettingsError, ValueError) as error:
        raise UsageError(f"environment: {error}") from error
    return settings


def credentials_from_files(
    target: str,
    *,
    tls: bool,
    ca_file: Path | None,
    cert_file: Path | None,
    key_file: Path | None,
    token_file: Path | None,
) -> tuple[grpc.ChannelCredentials | None, str | None]:
    """Return credentials (None: plaintext) and token (None: none) for a target, from the files that were named.

    Raises:
        UsageError: A file can't be used, or no certificate can be held against the target.
    """
    try:
        channel = channel_credentials(tls=tls, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        if channel is not None:
            check_server_name(target)
        return channel, read_token(token_file)
    except (CredentialsError, ValueError) as error:
        raise UsageError(str(error)) from error


def _toml(argv: list[str], variable: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get(variable))
    name = parser.parse_known_args(argv)[0].config
    if name is None:
        return {}
    try:
        return tomllib.loads(read_text(Path(name)))
    except (OSError, ValueError) as error:
        raise UsageError(f"config: {name}: {reason(error)}") from error


def _line(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (found {error['input']!r})" if place else message
