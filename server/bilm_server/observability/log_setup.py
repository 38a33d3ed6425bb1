"""The log, put together as configured: to standard error, and lines of test calls to a file."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bilm_server.log_levels import PARTS
from bilm_server.observability.access_log import test_calls
from bilm_server.observability.log_format import JsonFormatter, TextFormatter
from bilm_server.observability.log_writer import LineHandler


class Logs:
    """The configured log."""

    def __init__(self, handler: LineHandler, test_handler: LineHandler | None, test_descriptor: int | None) -> None:
        self._handlers = (handler,) if test_handler is None else (handler, test_handler)
        self._test_handler, self._test_descriptor = test_handler, test_descriptor

    @property
    def dropped(self) -> int:
        """Lines lost so far; for the metrics."""
        return sum(handler.writer.dropped for handler in self._handlers)

    def flush(self) -> None:
        """Wait a little until everything is written."""
        for handler in self._handlers:
            handler.flush()

    def close(self) -> None:
        """End logging; idempotent."""
        logging.getLogger().removeHandler(self._handlers[0])
        for handler in self._handlers:
            handler.close()
        if self._test_handler is not None and self._test_descriptor is not None:
            test_calls.removeHandler(self._test_handler)
            os.close(self._test_descriptor)
            self._test_descriptor = None


def configure_logs(
    level: str, style: str, levels: Mapping[str, int] | None = None, test_log: Path | None = None
) -> Logs:
    """Send the log to standard error.

    Args:
        level: least severe level that is logged.
        style: "text" or "json".
        levels: of single parts, from `parse_levels`.
        test_log: file for the access lines of calls that are marked as tests; None: they leave none.

    Raises:
        OSError: if that file can't be opened.
    """
    formatter = JsonFormatter() if style == "json" else TextFormatter()
    test_descriptor, test_handler = None, None
    if test_log is not None:
        # A named pipe without a reader is an error, then, instead of a start that waits for one
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        test_descriptor = os.open(test_log, flags, 0o640)
        test_handler = LineHandler(test_descriptor, formatter)
        test_handler.writer.start()
        test_calls.addHandler(test_handler)
    # Closed at the start of the process, descriptor 2 may by now be anything
    handler = LineHandler(None if sys.stderr is None else sys.stderr.fileno(), formatter)
    handler.writer.start()
    logging.getLogger("grpc._cython.cygrpc").addFilter(is_no_client_error)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for part, names in PARTS.items():
        for name in names:
            # Its own level always, or a part would follow one whose logger is above its own
            logging.getLogger(name).setLevel((levels or {}).get(part, level.upper()))
    return Logs(handler, test_handler, test_descriptor)


# A header that isn't UTF-8, with its bytes; a client that left while its response was on its way, or before there was
# one, with the path that it asked for (at level debug)
_CLIENT_ERROR_PREFIXES = (
    "Invalid encoding on",
    "ExecuteBatchError raised in core",
    "RPC cancelled for servicer method",
)


def is_no_client_error(record: logging.LogRecord) -> bool:
    """Return whether a record of grpc's logger is to be logged: not what any client can cause, with its bytes in it."""
    return not (isinstance(record.msg, UnicodeDecodeError) or str(record.msg).startswith(_CLIENT_ERROR_PREFIXES))
