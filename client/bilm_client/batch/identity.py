"""What makes a run the one that left a journal or an output behind."""

from pathlib import Path
from typing import Any

from bilm_client.batch.reader import InputText
from bilm_client.batch.settings import RunSettings
from bilm_client.cli.settings_sources import UsageError
from bilm_client.results import ModelInfo


def run_identity(settings: RunSettings, text: InputText, info: ModelInfo) -> dict[str, Any]:
    """Return what a run is recorded as: its input, options and model."""
    return {
        **text.identity(),
        "options": settings.recorded(),
        "model": info.name,
        "model_version": info.version,
        "precision": info.precision,
    }


def check_same_run(path: Path, found: dict[str, Any] | None, identity: dict[str, Any]) -> None:
    """Check that a file was left by the same run.

    Raises:
        UsageError: It wasn't; the message names what differs.
    """
    if found == identity:
        return
    old, new = _flat(found or {}), _flat(identity)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    values = ", ".join(f"{key}: then {_value(old, key)}, now {_value(new, key)}" for key in differing)
    raise UsageError(
        f"{path}: made with another {', '.join(differing)}; can't be resumed ({values}); --overwrite starts anew"
    )


def _value(identity: dict[str, Any], key: str) -> str:
    """Return what a run had there, for an error message; an older version may not have recorded it."""
    return str(identity[key]) if key in identity else "not recorded"


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = identity.get("options", {})
    return {key: value for key, value in identity.items() if key != "options"} | options
