"""Limits of the server's own; those of the contract are in `bilm_api.constants`."""

from typing import Final

RESERVED_SHARE: Final = 8
"""One part in so many of the engine's rows and steps is closed to long sentences."""


def for_long_sentences(limit: int) -> int:
    """Return the part of a limit of rows or steps that long sentences may fill."""
    return limit - limit // RESERVED_SHARE
