"""Limits of the server's own; those of the contract are in `bilm_api.constants`."""

from typing import Final

RESERVED_SHARE: Final = 8
"""One part in so many of the engine's rows and steps is closed to long sentences."""


BATCH_PARTS: Final = 4
"""Batch may hold all but one in so many parts of what is admitted, and of what waits to be converted."""


def for_batch(limit: int) -> int:
    """Return the part of a limit of tokens or bytes that batch requests may hold together."""
    return limit - limit // BATCH_PARTS


def for_long_sentences(limit: int) -> int:
    """Return the part of a limit of rows or steps that long sentences may fill."""
    return limit - limit // RESERVED_SHARE
