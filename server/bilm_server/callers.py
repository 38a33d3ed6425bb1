"""What single callers may do beside calling: the rights that the configuration gives to names."""

import logging
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated

from bilm_api.constants import NO_LOG_KEY
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from bilm_server.calls import CallRecord

_log = logging.getLogger("bilm_server.auth")


class Right(StrEnum):
    """Rights, as they stand in the configuration. Never renamed."""

    NO_LOG = "no-log"
    """To keep calls out of the access log, by the metadata x-bilm-no-log."""


def _check_name(name: str) -> str:
    if not name or name != name.strip() or not name.isprintable():
        raise ValueError("expected a name as the token file or the certificate gives it")
    return name


class CallerSettings(BaseModel):
    """One of `[[callers]]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_check_name)] = Field(description="as the token file or the certificate has it")
    rights: frozenset[Right] = Field(frozenset(), description="what it may do beside calling")


class CallerRights:
    """Who has which right; without authentication everybody has all of them."""

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


class NoLogCalls:
    """Counts the calls that were kept out of the access log, by caller (`CallObserver`).

    The log names a caller at its 1st, 10th, 100th, … such call, so that it tells of every caller and can't be flooded.
    """

    def __init__(self, rights: CallerRights) -> None:
        """Keep the rights."""
        self._rights = rights
        self._counts: dict[str, int] = {}

    @property
    def counts(self) -> Mapping[str, int]:
        """Calls by caller; for the metrics."""
        return dict(self._counts)

    def begin(self, call: CallRecord) -> None:
        """Do nothing: who calls isn't known."""

    def end(self, call: CallRecord) -> None:
        """Count the call if it was kept out of the access log."""
        if not call.is_test:
            return
        name = self._rights.account(call.caller)
        count = self._counts[name] = self._counts.get(name, 0) + 1
        if str(count).strip("0") == "1":
            who = f"caller {name}" if name else "callers without authentication"
            _log.info("%s: %d calls kept out of the access log by %s", who, count, NO_LOG_KEY)
