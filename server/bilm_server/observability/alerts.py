"""Errors in the log become messages of a webhook: grouped by place, a few a minute, never at the service's expense."""

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from typing import Final

from bilm_system.proxies import is_local_url

from bilm_server.observability.alert_groups import Alert, AlertEvent, AlertGroups
from bilm_server.observability.alert_payloads import AlertFormat, accept, body

_log = logging.getLogger(__name__)

ATTEMPTS: Final = 3
"""To post one message."""
_POST_TIMEOUT_S = 5.0
_RETRY_PAUSE_S = 2.0
_TOO_MANY_REQUESTS: Final = 429


class AlertHandler(logging.Handler):
    """Posts errors to a webhook from its own thread. Logging an error costs what it takes to count it."""

    def __init__(
        self,
        url: str,
        style: AlertFormat,
        server: str,
        groups: AlertGroups | None = None,
        *,
        post_timeout_s: float = _POST_TIMEOUT_S,
        retry_pause_s: float = _RETRY_PAUSE_S,
    ) -> None:
        """Keep what posts are made of; call `start` to start the thread.

        Args:
            url: of the webhook; it is a secret, no message and no log line has it.
            style: "jandi", or "json" for an object of this module's own.
            server: whose errors these are, as in "host:port".
            groups: how messages are grouped and limited.
            post_timeout_s: for the webhook to take a message.
            retry_pause_s: before the second attempt; twice as long before the third.
        """
        super().__init__(logging.ERROR)
        self._url, self._style = url, style
        self._post_timeout_s, self._retry_pause_s = post_timeout_s, retry_pause_s
        proxies: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})] if is_local_url(url) else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self.server = server
        """Whose errors these are; may be set again once the port is known."""
        self._groups = groups or AlertGroups()
        self._changed = threading.Condition()
        self._stopping = False
        self._dropped = 0
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    @property
    def dropped(self) -> int:
        """Events that no message could be sent about; for the metrics."""
        return self._dropped

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Count an error; part of logging's interface."""
        try:
            event = AlertEvent.of(record)
        except Exception:  # arguments that don't fit the message: the log counts them, too
            self._drop(1)
            return
        with self._changed:
            if self._stopping:
                self._dropped += 1
                return
            self._groups.add(event, time.monotonic())
            self._changed.notify_all()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Send what there is, for `timeout_s` at most, and end; idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """End the thread; part of logging's interface."""
        self.stop()
        super().close()

    # ---- in the thread ----

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                while not self._stopping and (wait_s := self._groups.due_at_s() - time.monotonic()) > 0:
                    self._changed.wait(min(wait_s, threading.TIMEOUT_MAX))
                alerts = self._groups.take(time.monotonic(), everything=self._stopping)
            for alert in alerts:
                self._send(alert)
        with self._changed:
            alerts = self._groups.take(time.monotonic(), everything=True)
        for alert in alerts:
            self._send(alert)

    def _send(self, alert: Alert) -> None:
        data = json.dumps(body(alert, self._style, self.server), ensure_ascii=False).encode()
        for attempt in range(1, ATTEMPTS + 1):
            failure, again = self._post(data)
            if not failure:
                if self._failing:
                    _log.info("the webhook takes alerts again")
                self._failing = False
                return
            if not again or self._stopping or attempt == ATTEMPTS:
                break
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, self._retry_pause_s * attempt)
        self._drop(alert.count)
        if not self._failing:
            _log.warning("the webhook takes no alerts: %s", failure)
        self._failing = True

    def _post(self, data: bytes) -> tuple[str, bool]:
        """Post a message; return why it failed, "" if it didn't, and whether another attempt makes sense."""
        headers = {"Content-Type": "application/json", "Accept": accept(self._style), "User-Agent": "bilm-serve"}
        request = urllib.request.Request(self._url, data, headers)  # noqa: S310 - the configuration lets only http and https pass
        try:
            self._opener.open(request, timeout=self._post_timeout_s).close()
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP status {error.code}", error.code >= 500 or error.code == _TOO_MANY_REQUESTS
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None)
            cause = reason if isinstance(reason, Exception) else error
            return type(cause).__name__, True  # its text could name the URL
        return "", False

    def _drop(self, count: int) -> None:
        with self._changed:
            self._dropped += count


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a redirected POST would arrive as a GET, and count as delivered."""

    def redirect_request(self, *_: object) -> None:
        return None
