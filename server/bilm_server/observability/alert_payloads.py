"""What is posted to a webhook about logged errors."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

from bilm_server.observability.alert_groups import Alert, AlertEvent

AlertFormat = Literal["jandi", "json"]

_MAX_PLACES_IN_SUMMARY = 10
_JANDI_COLOR = "#D32F2F"
_ACCEPT: dict[AlertFormat, str] = {"jandi": "application/vnd.tosslab.jandi-v2+json", "json": "application/json"}


def accept(style: AlertFormat) -> str:
    """Return the header `Accept` of a post."""
    return _ACCEPT[style]


def body(alert: Alert, style: AlertFormat, server: str) -> dict[str, Any]:
    """Return the object that is posted."""
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
    """Return what JANDI's incoming webhook takes: a message, and below it a block of titles with descriptions."""
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
