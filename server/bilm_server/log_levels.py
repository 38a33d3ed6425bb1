"""Levels of the log, of single parts too, as the setting `loggers` gives them."""

import logging
from collections.abc import Mapping
from typing import Final

OFF: Final = logging.CRITICAL + 1
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": OFF,
}
PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    **{
        part: (f"bilm_server.{part}",)
        for part in (
            "acceptor", "access", "alerts", "auth", "descriptors", "errors", "health", "inference", "lifecycle", "main",
            "metrics", "ready_port", "test", "tls", "watchdog",
        )
    },
    "model": ("bilm_model",),
    "tracing": ("opentelemetry",),
}  # fmt: skip
"""What can be switched by itself: parts, and the loggers of each."""


def parse_levels(text: str) -> dict[str, int]:
    """Return the levels of single parts, as in "access=off,health=debug".

    Raises:
        ValueError: naming every bad item, and what is known.
    """
    levels, bad = {}, []
    for item in filter(None, map(str.strip, text.split(","))):
        part, _, level = (word.strip() for word in item.partition("="))
        if part in PARTS and level in _LEVELS:
            levels[part] = _LEVELS[level]
        else:
            bad.append(item)
    if bad:
        known = f"{', '.join(sorted(PARTS))}; levels: {', '.join(_LEVELS)}"
        raise ValueError(f"can't read {', '.join(map(repr, bad))}: expected PART=LEVEL, parts: {known}")
    return levels
