"""How often callers use their right to keep calls out of the access log."""

import logging
from collections.abc import Mapping

from bilm_api.constants import NO_LOG_KEY

from bilm_server.observability.call_record import CallRecord
from bilm_server.security.callers import CallerRights

_log = logging.getLogger(__name__)


class NoLogCalls:
    """Counts the calls that were kept out of the access log, by caller (`CallObserver`).

    The log names a caller at its 1st, 10th, 100th, … such call, so that every caller is named and none can flood it.
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
        """Do nothing: the caller isn't known yet."""

    def end(self, call: CallRecord) -> None:
        """Count the call if it was kept out of the access log."""
        if not call.is_test:
            return
        name = self._rights.account(call.caller)
        count = self._counts[name] = self._counts.get(name, 0) + 1
        if str(count).strip("0") == "1":
            who = f"caller {name}" if name else "callers without authentication"
            _log.info("%s: %d calls kept out of the access log by %s", who, count, NO_LOG_KEY)
