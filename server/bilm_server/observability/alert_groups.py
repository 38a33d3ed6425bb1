"""Which messages are due about logged errors: grouped by place, a few a minute. Pure: no clock, no threads."""

import logging
from collections import deque
from dataclasses import dataclass, field

from bilm_server.observability.log_format import raised_at, short_path

_MAX_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class AlertEvent:
    """One logged error. Of an exception it has type and place, not the text: that may quote a request.

    Attributes:
        time_s: since the epoch.
        level: of the record.
        logger: its name.
        file: that logged it.
        line: of that file.
        message: as logged, cut to 500 characters.
        exception: its type; "" without one.
        raised_file: that raised the exception.
        raised_line: of that file.
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
        """Return what is sent of a record: neither its arguments nor its traceback."""
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
        """What events are grouped by."""
        return self.file, self.line, self.raised_file, self.raised_line


@dataclass(frozen=True)
class Alert:
    """One message.

    Attributes:
        groups: the latest event of each place, with the count of its events since the last message; more than one: a
            summary.
        n_elsewhere: events at further places.
    """

    groups: tuple[tuple[AlertEvent, int], ...]
    n_elsewhere: int = 0

    @property
    def count(self) -> int:
        """Events that it reports."""
        return self.n_elsewhere + sum(count for _, count in self.groups)


@dataclass
class _Place:
    event: AlertEvent
    count: int
    next_s: float


@dataclass
class AlertGroups:
    """Which messages are due. Pure: no clock, no threads.

    Attributes:
        interval_s: between messages about one place.
        per_minute: messages; the last one sums up what else there is.
        max_places: that are distinguished; events at others are only counted.
    """

    interval_s: float = 60.0
    per_minute: int = 10
    max_places: int = 100
    _groups: dict[tuple[str, int, str, int], _Place] = field(default_factory=dict)
    _sent_s: deque[float] = field(default_factory=deque)
    _n_elsewhere: int = 0

    def add(self, event: AlertEvent, now_s: float) -> None:
        """Count an event."""
        if len(self._groups) >= self.max_places:
            self._forget_quiet(now_s)
        group = self._groups.get(event.place)
        if group is not None:
            group.event, group.count = event, group.count + 1
        elif len(self._groups) < self.max_places:
            self._groups[event.place] = _Place(event, 1, now_s)
        else:
            self._n_elsewhere += 1

    def due_at_s(self) -> float:
        """Return when `take` has something to return; infinity: not before the next event."""
        waiting = [group.next_s for group in self._groups.values() if group.count]
        if not waiting and not self._n_elsewhere:
            return float("inf")
        first_s = 0.0 if self._n_elsewhere else min(waiting)
        return first_s if len(self._sent_s) < self.per_minute else max(first_s, self._sent_s[0] + 60)

    def take(self, now_s: float, everything: bool = False) -> list[Alert]:
        """Take out what is due; with `everything` also what would wait for its interval."""
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
