"""What single callers may do: the rights and the ceilings that the configuration gives to names."""

from collections.abc import Iterable, Mapping

from bilm_api.constants import Priority

from bilm_server.config import CallerSettings, Right


class CallerRights:
    """The rights of each caller; without authentication every caller has all of them, and no ceiling."""

    def __init__(self, callers: Iterable[CallerSettings], authenticated: bool) -> None:
        """Keep the rights of each name.

        Args:
            callers: that have any, or a ceiling; other names have none.
            authenticated: whether callers prove who they are. Without that a name is an address, which proves nothing.
        """
        self._authenticated = authenticated
        self.replace(callers)

    def replace(self, callers: Iterable[CallerSettings]) -> None:
        """Keep these rights from now on."""
        self._callers: Mapping[str, CallerSettings] = {caller.name: caller for caller in callers}

    def has(self, name: str, right: Right) -> bool:
        """Return whether the caller of this name has a right."""
        if not self._authenticated:
            return True
        caller = self._callers.get(name)
        return caller is not None and right in caller.rights

    def max_priority(self, name: str) -> Priority:
        """Return the highest priority that the caller of this name has."""
        caller = self._callers.get(name) if self._authenticated else None
        return Priority.INTERACTIVE if caller is None else caller.max_priority

    def account(self, name: str) -> str:
        """Return the name that uses of rights are counted by: "" without authentication, as addresses have no bound."""
        return name if self._authenticated else ""
