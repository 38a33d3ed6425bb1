"""Which hosts a request may name: else a page of a foreign site could have a name of its own lead to this server."""

import ipaddress
from collections.abc import Collection

ANY_HOST = "*"


class AllowedHosts:
    """The names and addresses that requests may have in `Host`."""

    def __init__(self, names: Collection[str]) -> None:
        """Keep the names.

        Args:
            names: without ports, in any case; `ANY_HOST`: all are allowed. None at all: names and addresses of the
                loopback.
        """
        self._names = frozenset(name.lower().strip("[]") for name in names)

    def __contains__(self, host: str) -> bool:
        """Return whether a `Host` header, which may have a port, names an allowed one."""
        if ANY_HOST in self._names:
            return True
        name = _without_port(host.lower())
        return name in self._names if self._names else _is_loopback(name)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[")
    return host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
