"""Which hosts a request may name: else a page of a foreign site could have a name of its own lead to this server."""

import ipaddress
import re
from collections.abc import Collection
from typing import Final
from urllib.parse import unquote

from bilm_server.protocols.http.messages import HttpRefusalError

ANY_HOST = "*"

# RFC 3986's host and port, without what Host may not have: a user, a path, an address of a future version
_AUTHORITY: Final = re.compile(r"(\[[0-9a-f.]*:[0-9a-f:.]*\]|[a-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")
_ABSOLUTE: Final = re.compile(r"https?://([^/]*)(/.*)?", re.IGNORECASE)


class AllowedHosts:
    """The names and addresses that requests may have in `Host`."""

    def __init__(self, names: Collection[str]) -> None:
        """Keep the names.

        Args:
            names: without ports, in any case; `ANY_HOST`: all are allowed. None at all: names and addresses of the
                loopback.
        """
        self._names = frozenset(name.lower().strip("[]") for name in names)

    def check(self, host: str) -> None:
        """Make sure that a request may name a host.

        Args:
            host: value of `Host`, or what stands for it in the target; it may have a port.

        Raises:
            HttpRefusalError: it isn't a host and a port, or this server doesn't go by that name.
        """
        found = _AUTHORITY.fullmatch(host.lower())
        if found is None:
            raise HttpRefusalError("host: expected a name or an address, and perhaps a port", status=400)
        name = found[1].strip("[]")
        if ANY_HOST in self._names:
            return
        if not (name in self._names if self._names else _is_loopback(name)):
            raise HttpRefusalError("host: this server doesn't go by that name (http_host)", status=421)


def split_target(target: str) -> tuple[str | None, str]:
    """Return the host that a request's target names, None for a mere path, and the path, decoded.

    Args:
        target: without the query, as RFC 9112 has it: a path, or a URL as clients send it to proxies.
    """
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        return None, unquote(target)
    return absolute[1], unquote(absolute[2] or "/")


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
