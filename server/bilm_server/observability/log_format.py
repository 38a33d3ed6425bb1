"""A log record as a line: text for people, or a JSON object. Never the text of a request."""

import json
import logging
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_TEXT = "%(asctime)s %(levelname)s %(name)s %(filename)s:%(lineno)d %(message)s"
_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_PLAIN_VALUE = re.compile(r"[\w.:/@%\[\]-]+")


class TextFormatter(logging.Formatter):
    """A line for people: fields follow the message as key=value."""

    def __init__(self) -> None:
        super().__init__(_TEXT)
        self._second = (-1, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the local time; part of logging's interface. A second's records share what they have in common."""
        second, text = self._second
        if second != int(record.created):
            second = int(record.created)
            text = time.strftime(datefmt or self.default_time_format, time.localtime(second))
            self._second = second, text
        return f"{text},{int(record.msecs):03d}"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Append the fields; part of logging's interface."""
        fields = "".join(f" {key}={_text(value)}" for key, value in getattr(record, "fields", {}).items())
        record.message = _printable(record.message) + fields
        return super().formatMessage(record)


def _text(value: object) -> str:
    text = str(value)
    if isinstance(value, int | float):
        return text
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _printable(text: str) -> str:
    """Return text that neither makes further lines nor moves the terminal's cursor."""
    return text if text.isprintable() else text.translate(_CONTROL_CHARACTERS)


class JsonFormatter(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; part of logging's interface."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "file": record.filename,
            "line": record.lineno,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            file, number = raised_at(record.exc_info[1])
            line["exception"] = {
                "type": type(record.exc_info[1]).__qualname__,
                "file": file,
                "line": number,
                "traceback": self.formatException(record.exc_info),
            }
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, ensure_ascii=False, default=str)


def raised_at(error: BaseException) -> tuple[str, int]:
    """Return the file, as its package knows it, and the line that raised; "" and 0 if nothing did."""
    traceback = error.__traceback__
    if traceback is None:
        return "", 0
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return short_path(traceback.tb_frame.f_code.co_filename), traceback.tb_lineno


def short_path(path: str) -> str:
    """Return a source file's path without what differs from machine to machine."""
    return "/".join(Path(path).parts[-2:])
