"""Errors in the log become messages of a webhook: grouped by place, a few a minute, never at the service's expense."""

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from bilm_system.proxies import is_local_url

from bilm_server.logs import raised_at, short_path

_log = logging.getLogger("bilm_server.alerts")

AlertFormat = Literal["jandi", "json"]

_MAX_MESSAGE_CHARACTERS = 500
_MAX_PLACES_IN_SUMMARY = 10
_POST_TIMEOUT_S = 5.0
_ATTEMPTS: Final = 3
_RETRY_PAUSE_S = 2.0
_TOO_MANY_REQUESTS: Final = 429
_JANDI_COLOR = "#D32F2F"
_JANDI_ACCEPT = "application/vnd.tosslab.jandi-v2+json"


@dataclass(frozen=True)
class AlertEvent:
    """One logged error. Of an exception it has type and place, not the text: that may quote a request.

    Attributes:
        time_s: since the epoch.
        level: of the record.
        logger: its name.
        file: that logged it.
        line: likewise.
        message: as logged, cut to 500 characters.
        exception: its type; "" without one.
        raised_file: that raised the exception.
        raised_line: likewise.
    """

    time_s: float
    level: str
    logger: str
    file: str
    line: int
    message: str
    exception: str = ""
    raised_file: str = ""
    raised_line: int = 0

    @classmethod
    def of(cls, record: logging.LogRecord) -> "AlertEvent":
        """Takes from a record what is sent; keeps neither its arguments nor its traceback."""
        error = record.exc_info[1] if record.exc_info else None
        raised_file, raised_line = ("", 0) if error is None else raised_at(error)
        return cls(
            record.created,
            record.levelname,
            record.name,
            short_path(record.pathname),
            record.lineno,
            record.getMessage()[:_MAX_MESSAGE_CHARACTERS],
            "" if error is None else type(error).__qualname__,
            raised_file,
            raised_line,
        )

    @property
    def place(self) -> tuple[str, int, str, int]:
        """What is grouped."""
        return self.file, self.line, self.raised_file, self.raised_line


@dataclass(frozen=True)
class Alert:
    """One message.

    Attributes:
        groups: the latest event of each place that it tells of, with the count of events since the last message; more
            than one: a summary.
        n_elsewhere: events at further places.
    """

    groups: tuple[tuple[AlertEvent, int], ...]
    n_elsewhere: int = 0

    @property
    def count(self) -> int:
        """Events that it tells of."""
        return self.n_elsewhere + sum(count for _, count in self.groups)


@dataclass
class _Group:
    event: AlertEvent
    count: int
    next_s: float


@dataclass
class AlertGroups:
    """Which messages are due. Pure: no clock, no threads.

    Attributes:
        interval_s: between messages about one place.
        per_minute: messages; the last one sums up what else there is.
        max_places: that are told apart; events at others are only counted.
    """

    interval_s: float = 60.0
    per_minute: int = 10
    max_places: int = 100
    _groups: dict[tuple[str, int, str, int], _Group] = field(default_factory=dict)
    _sent_s: deque[float] = field(default_factory=deque)
    _n_elsewhere: int = 0

    def add(self, event: AlertEvent, now_s: float) -> None:
        """Counts an event."""
        if len(self._groups) >= self.max_places:
            self._forget_quiet(now_s)
        group = self._groups.get(event.place)
        if group is not None:
            group.event, group.count = event, group.count + 1
        elif len(self._groups) < self.max_places:
            self._groups[event.place] = _Group(event, 1, now_s)
        else:
            self._n_elsewhere += 1

    def due_at_s(self) -> float:
        """When `take` has something to give; infinity: not before the next event."""
        waiting = [group.next_s for group in self._groups.values() if group.count]
        if not waiting and not self._n_elsewhere:
            return float("inf")
        first_s = 0.0 if self._n_elsewhere else min(waiting)
        return first_s if len(self._sent_s) < self.per_minute else max(first_s, self._sent_s[0] + 60)

    def take(self, now_s: float, everything: bool = False) -> list[Alert]:
        """Takes out what is due; with `everything` also what would wait for its interval."""
        while self._sent_s and self._sent_s[0] + 60 <= now_s:
            self._sent_s.popleft()
        room = self.per_minute - len(self._sent_s)
        ready = [group for group in self._groups.values() if group.count and (everything or group.next_s <= now_s)]
        if room <= 0 or not (ready or self._n_elsewhere):
            return []
        n_single = len(ready) if len(ready) + bool(self._n_elsewhere) <= room else room - 1
        alerts = [Alert(((group.event, group.count),)) for group in ready[:n_single]]
        rest = tuple((group.event, group.count) for group in ready[n_single:])
        if rest or self._n_elsewhere:
            alerts.append(Alert(rest, self._n_elsewhere))
        self._sent_s.extend([now_s] * len(alerts))
        self._n_elsewhere = 0
        for group in ready:
            group.count, group.next_s = 0, now_s + self.interval_s
        return alerts

    def _forget_quiet(self, now_s: float) -> None:
        self._groups = {place: group for place, group in self._groups.items() if group.count or group.next_s > now_s}


class AlertHandler(logging.Handler):
    """Posts errors to a webhook from a thread of its own. Logging an error costs what it takes to count it."""

    def __init__(self, url: str, style: AlertFormat, server: str, groups: AlertGroups | None = None) -> None:
        """Prepares; `start` starts.

        Args:
            url: of the webhook; it is a secret, no message and no log line has it.
            style: "jandi", or "json" for an object of this module's own.
            server: whose errors these are, as in "host:port".
            groups: how messages are grouped and limited.
        """
        super().__init__(logging.ERROR)
        self._url, self._style = url, style
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
        """Begins to send."""
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Part of logging's interface."""
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
        """Sends what there is, for as long as it is given; then ends. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """Part of logging's interface."""
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
        body = json.dumps(_body(alert, self._style, self.server), ensure_ascii=False).encode()
        for attempt in range(1, _ATTEMPTS + 1):
            failure, again = self._post(body)
            if not failure:
                if self._failing:
                    _log.info("the webhook takes alerts again")
                self._failing = False
                return
            if not again or self._stopping or attempt == _ATTEMPTS:
                break
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, _RETRY_PAUSE_S * attempt)
        self._drop(alert.count)
        if not self._failing:
            _log.warning("the webhook takes no alerts: %s", failure)
        self._failing = True

    def _post(self, body: bytes) -> tuple[str, bool]:
        """Returns why it failed, "" if it didn't, and whether that may pass."""
        accept = _JANDI_ACCEPT if self._style == "jandi" else "application/json"
        headers = {"Content-Type": "application/json", "Accept": accept, "User-Agent": "bilm-serve"}
        request = urllib.request.Request(self._url, body, headers)  # noqa: S310 - the configuration lets only http and https pass
        try:
            self._opener.open(request, timeout=_POST_TIMEOUT_S).close()
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
    """A redirected POST would arrive as a GET, and count as delivered."""

    def redirect_request(self, *_: object) -> None:
        return None


def _body(alert: Alert, style: AlertFormat, server: str) -> dict[str, Any]:
    return _jandi(alert, server) if style == "jandi" else _plain(alert, server)


def _plain(alert: Alert, server: str) -> dict[str, Any]:
    if len(alert.groups) == 1 and not alert.n_elsewhere:
        return {"server": server, **_plain_group(*alert.groups[0])}
    return {
        "server": server,
        "count": alert.count,
        "places": [_plain_group(*group) for group in alert.groups[:_MAX_PLACES_IN_SUMMARY]],
    }


def _plain_group(event: AlertEvent, count: int) -> dict[str, Any]:
    line = asdict(event)
    del line["time_s"]
    return {"time": _iso_time(event.time_s), **line, "count": count}


def _jandi(alert: Alert, server: str) -> dict[str, Any]:
    """JANDI's incoming webhook: a message, and below it a block of titles with descriptions."""
    if len(alert.groups) == 1 and not alert.n_elsewhere:
        event, count = alert.groups[0]
        info = [_jandi_group(event, count), {"title": "Server", "description": server}]
        return {"body": f"bilm-serve: {event.level} on {server}", "connectColor": _JANDI_COLOR, "connectInfo": info}
    info = [_jandi_group(event, count) for event, count in alert.groups[:_MAX_PLACES_IN_SUMMARY]]
    return {
        "body": f"bilm-serve: {alert.count} more errors on {server}",
        "connectColor": _JANDI_COLOR,
        "connectInfo": [*info, {"title": "Server", "description": server}],
    }


def _jandi_group(event: AlertEvent, count: int) -> dict[str, str]:
    raised = f"\n{event.exception} at {event.raised_file}:{event.raised_line}" if event.exception else ""
    return {
        "title": f"{event.file}:{event.line} ({event.logger}), {count} ×",
        "description": f"{event.message}{raised}\n{_iso_time(event.time_s)}",
    }


def _iso_time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")
