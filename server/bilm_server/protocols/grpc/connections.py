"""Connections take descriptors: how many fit below `ulimit -n`, how idle ones end, and health beside them.

At the limit a process can neither accept nor open a file, nor log that. So gRPC refuses connections before that.
Options and numbers were measured on grpcio 1.85.1; docs/descriptors.md has them.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from bilm_server.errors import ConfigurationError

HEALTH_CONNECTIONS: Final = 64
"""Connections that the health listener has for itself."""
OWN_RESERVE: Final = 64
"""Descriptors for everything else that is opened later: files that are read again, metrics, traces, alerts, a GPU."""
MOST_BY_DEFAULT: Final = 10_000
"""Connections unless more are asked for, as each takes memory, too, and some systems set no limit to descriptors."""

_LOW = 512  # a checker that opens a connection a second and closes none has 330 of them at the default age of 300 s
_MAX_INT = 2**31 - 1  # gRPC's options are C ints

_SILENCE_MS = 20_000  # for a handshake, the first HTTP/2 frames and the response to a ping
_KEEPALIVE_MS = 60_000
_AGE_GRACE_MS = 600_000  # longer than any sensible deadline
_HEALTH_SILENCE_MS = 5_000
_HEALTH_AGE_MS = 30_000
_HEALTH_GRACE_MS = 300_000  # for Watch, the only call there that lasts

_log = logging.getLogger(__name__)

Options = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Descriptors:
    """File descriptors of this process.

    Attributes:
        limit: that it may have open.
        in_use: that it has open.
    """

    limit: int
    in_use: int

    @classmethod
    def now(cls) -> "Descriptors":
        """Return the limit and the use as they are."""
        return cls(descriptor_limit(), open_descriptors())


def open_descriptors() -> int:
    """Return how many descriptors this process has open; 0 on Windows, which has none."""
    if sys.platform == "win32":
        return 0
    folder = Path("/proc/self/fd")
    if not folder.exists():
        folder = Path("/dev/fd")
    return sum(1 for _ in folder.iterdir()) - 1  # one is for listing them


def descriptor_limit() -> int:
    """Return the soft limit, as `ulimit -n` shows it; the largest C int if there is none."""
    if sys.platform == "win32":
        return _MAX_INT
    import resource  # noqa: PLC0415 - not on Windows

    return bounded(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def bounded(limit: int) -> int:
    """Return a limit as a C int; one that is infinite, which is negative or huge, as the largest."""
    return min(limit, _MAX_INT) if limit >= 0 else _MAX_INT


def connection_limit(wanted: int, found: Descriptors | None = None) -> int:
    """Return how many connections the server accepts; log a warning if the limit of descriptors makes them few.

    Call it before anything listens: what is open by then counts, and what the model opens (a GPU) is in the reserve.

    Args:
        wanted: the number that was configured; 0: as many as fit, at most `MOST_BY_DEFAULT`.
        found: the process's descriptors; None: as they are now.

    Raises:
        ConfigurationError: if so many don't fit, or none.
    """
    found = found or Descriptors.now()
    limit, used, reserve = found.limit, found.in_use, OWN_RESERVE + HEALTH_CONNECTIONS
    fitting = limit - used - reserve
    why = f"ulimit -n is {limit}, with {used} descriptors in use and {reserve} kept in reserve"
    if wanted > fitting or fitting < 1:
        asked = f"{wanted} connections don't fit" if wanted else "no connection fits"
        raise ConfigurationError(f"max_connections: {asked}: {why}; {_remedy(used + reserve + (wanted or _LOW))}")
    if not wanted and fitting < _LOW:
        _log.warning("only %d connections fit: %s; %s", fitting, why, _remedy(used + reserve + _LOW))
    return wanted or min(fitting, MOST_BY_DEFAULT)


def http_share(max_connections: int) -> int:
    """Return how many of all connections are HTTP's where that is on; the rest is gRPC's, which counts by itself.

    Raises:
        ConfigurationError: if there is only one.
    """
    if max_connections < 2:
        raise ConfigurationError("max_connections: 1 connection can't be shared by gRPC and HTTP, expected 2 or more")
    return max_connections // 2


def _remedy(least: int) -> str:
    rounded = -(-least // 1024) * 1024
    return f"set it to {rounded} or more (LimitNOFILE= in a systemd unit, --ulimit nofile= for a container)"


def connection_options(max_connections: int, max_age_s: float) -> Options:
    """Return gRPC's options for how many connections there are and how they end.

    No option for idle ones: `grpc.max_connection_idle_ms` loses the call that comes just then (1 of 200; some hang
    until their deadline). Age ends them without a loss.

    Args:
        max_connections: beyond these a caller gets UNAVAILABLE at once.
        max_age_s: when callers are asked to connect anew, so that they spread again behind an L4 balancer.
    """
    return (
        *_limits(max_connections, _SILENCE_MS),
        ("grpc.max_connection_age_ms", min(_MAX_INT, round(1000 * max_age_s))),
        ("grpc.max_connection_age_grace_ms", _AGE_GRACE_MS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    )


def health_server(interceptor: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    """Return a server for an address where there is nothing but health.

    gRPC counts the connections of each address by themselves, so a flood of the other one doesn't shut checkers out.
    Checkers that never close their connections find them closed soon.

    Args:
        interceptor: what calls pass through.
    """
    options: Options = (
        *_limits(HEALTH_CONNECTIONS, _HEALTH_SILENCE_MS),
        ("grpc.max_connection_age_ms", _HEALTH_AGE_MS),
        ("grpc.max_connection_age_grace_ms", _HEALTH_GRACE_MS),
        ("grpc.keepalive_time_ms", _HEALTH_AGE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.max_receive_message_length", 64 * 1024),
        ("grpc.max_concurrent_streams", 16),
        ("grpc.so_reuseport", 0),
    )
    return grpc.aio.server(interceptors=[interceptor], options=options)


def _limits(max_connections: int, silence_ms: int) -> Options:
    return (
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", silence_ms),  # 120 s by default, for those that say nothing at all
        ("grpc.http2.settings_timeout", silence_ms),  # 60 s by default, for those that say hello and go
        ("grpc.keepalive_timeout_ms", silence_ms),
        ("grpc.http2.ping_timeout_ms", silence_ms),  # without it the response to a keepalive ping may take 60 s
    )
