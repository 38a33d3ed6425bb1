"""What single callers may do beside calling: the rights that the configuration gives to names."""

from collections.abc import Iterable, Mapping

from bilm_server.config import CallerSettings, Right


class CallerRights:
    """The rights of each caller; without authentication every caller has all of them."""

    def __init__(self, callers: Iterable[CallerSettings], authenticated: bool) -> None:
        """Keep the rights of each name.

        Args:
            callers: that have any; other names have none.
            authenticated: whether callers prove who they are. Without that a name is an address, which proves nothing.
        """
        self._rights: Mapping[str, frozenset[Right]] = {caller.name: caller.rights for caller in callers}
        self._authenticated = authenticated

    def has(self, name: str, right: Right) -> bool:
        """Return whether the caller of this name has a right."""
        return not self._authenticated or right in self._rights.get(name, ())

    def account(self, name: str) -> str:
        """Return the name that uses of rights are counted by: "" without authentication, as addresses have no bound."""
        return name if self._authenticated else ""
