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
    "access": ("bilm_server.observability.access_log",),
    "acceptor": ("bilm_server.protocols.grpc.acceptor", "bilm_server.protocols.grpc.unix_sockets"),
    "alerts": ("bilm_server.observability.alerts",),
    "auth": ("bilm_server.security.auth", "bilm_server.observability.no_log_calls"),
    "descriptors": ("bilm_server.protocols.grpc.connections",),
    "errors": ("bilm_server.protocols.grpc.interceptors",),
    "health": ("bilm_server.protocols.grpc.health",),
    "http": ("bilm_server.protocols.http", "uvicorn"),
    "inference": ("bilm_server.inference",),
    "lifecycle": ("bilm_server.lifecycle", "bilm_server.app", "bilm_server.embedding.model_set"),
    "main": ("bilm_server.main", "bilm_server.preflight", "bilm_server.served_model"),
    "metrics": ("bilm_server.protocols.ops.metrics_endpoint", "bilm_server.observability.resources"),
    "model": ("bilm_model",),
    "ready_port": ("bilm_server.protocols.ops.readiness_port",),
    "test": ("bilm_server.test",),
    "tls": ("bilm_server.security.tls",),
    "tracing": ("opentelemetry",),
    "watchdog": ("bilm_server.inference.watchdog",),
}
"""What can be switched by itself: each part's loggers, with those below them unless another part has them.

The names of parts are older than those of the modules, and stay.
"""


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
