"""What is written down of every call, and what is made of it: right, refused, excused by a fault, or a failure."""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import grpc
from bilm_client import BilmError, SentenceError, ServiceError
from bilm_client.errors import service_error

from tests.fault.known_answers import WrongAnswerError

HANG_MARGIN_S = 2.0
"""Longer than this after its deadline, a call counts as hung."""
RECOVERY_S = 4.0
"""A fault may make calls fail for so long after it has ended: connections are made anew, retries are on their way."""

Verdict = Literal["right", "refused", "excused", "unexpected", "wrong", "hang"]
VERDICTS: tuple[Verdict, ...] = ("right", "refused", "excused", "unexpected", "wrong", "hang")

# What a fault may do to calls that it meets: on which paths, and with which statuses they may fail
_LATE = frozenset({"DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED OVERLOADED"})
_BROKEN = _LATE | {"UNAVAILABLE", "CANCELLED"}
_AWAY = _BROKEN | {"UNAVAILABLE SHUTTING_DOWN", "UNAVAILABLE MODEL_LOADING", "NOT_SERVING"}
_BOTH = ("direct", "proxy")
EXCUSES: Mapping[str, tuple[tuple[str, ...], Set[str]]] = {
    "kill": (_BOTH, _AWAY),
    "drain": (_BOTH, _AWAY),
    "stop": (_BOTH, _LATE),
    "cut": (("proxy",), _BROKEN),
    "finish client": (("proxy",), _BROKEN),
    "finish server": (("proxy",), _BROKEN),
    "swallow": (("proxy",), _BROKEN),
    "hold": (("proxy",), _LATE),
    "delay": (("proxy",), _LATE),
    "refuse": (("proxy",), _BROKEN),
    "lost packets": (_BOTH, _BROKEN),
    "packet resets": (_BOTH, _BROKEN),
    "black hole": (_BOTH, _BROKEN),
    "burst": (_BOTH, frozenset({"RESOURCE_EXHAUSTED OVERLOADED"})),
}
"""Kinds that aren't here (vanishing clients, slow readers, bad frames, …) excuse nothing."""


@dataclass(frozen=True)
class Record:
    """One call, or one result of a stream; times of the machine's monotonic clock.

    Attributes:
        caller: What kind of caller made it.
        path: How it went to the server.
        begun_s: When.
        ended_s: When it had its answer or its error.
        limit_s: Its deadline, in seconds from its beginning.
        status: "OK", or the status code and, where there is one, the reason.
        expected: The status that it should have.
        detail: What went wrong, for people to read.
        wrong: Whether the answer wasn't the known one.
    """

    caller: str
    path: str
    begun_s: float
    ended_s: float
    limit_s: float
    status: str
    expected: str
    detail: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Window:
    """When a fault was active."""

    kind: str
    begun_s: float
    ended_s: float
    note: str = ""


class StatusError(Exception):
    """A call has ended with a status of its own kind, as health checks do; the message is what it is."""


@dataclass
class Attempt:
    """A call under way.

    Attributes:
        succeeded: Whether it has ended with the right answer.
    """

    succeeded: bool = False


class Recorder:
    """Writes records to a file, a JSON line each; from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        self.n_records = 0

    def open(self) -> None:
        """Begins to write."""
        self._file = self._path.open("w", encoding="utf-8")

    def close(self) -> None:
        """Ends it."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    @contextmanager
    def call(self, caller: str, path: str, limit_s: float, expected: str = "OK") -> Iterator[Attempt]:
        """Writes down how the call in the context ends; its errors go no further."""
        attempt = Attempt()
        begun_s, status, detail, wrong = time.monotonic(), "OK", "", False
        try:
            yield attempt
            attempt.succeeded = True
        except WrongAnswerError as error:
            detail, wrong = str(error), True
        except StatusError as error:
            status = str(error)
        except (BilmError, grpc.RpcError) as error:
            status, detail = status_of(error), f"{type(error).__name__}: {error}"[:300]
        self.write(Record(caller, path, begun_s, time.monotonic(), limit_s, status, expected, detail, wrong))

    def write(self, record: Record) -> None:
        """Writes a record, unless the file is closed."""
        line = json.dumps(asdict(record), ensure_ascii=False)
        with self._lock:
            if self._file is not None:
                self.n_records += 1
                self._file.write(line + "\n")


def status_of(error: Any) -> str:
    """The status code of an error of either API and, where there is one, the reason."""
    if isinstance(error, grpc.RpcError):
        error = service_error(error)
    if not isinstance(error, ServiceError | SentenceError):
        return type(error).__name__
    return f"{error.code.name} {error.reason}".strip()


def read_records(path: Path) -> list[Record]:
    """What a `Recorder` wrote."""
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(record: Record, windows: Iterable[Window]) -> Verdict:
    """What a call's end means, in view of the faults that it met."""
    if record.wrong:
        return "wrong"
    if record.ended_s - record.begun_s > record.limit_s + HANG_MARGIN_S:
        return "hang"
    if record.status == record.expected:
        return "right" if record.status == "OK" else "refused"
    if record.status != "OK" and any(_excuses(window, record) for window in windows):
        return "excused"
    return "unexpected"


def _excuses(window: Window, record: Record) -> bool:
    paths, statuses = EXCUSES.get(window.kind, ((), frozenset()))
    length_s = window.ended_s - window.begun_s
    # What a network held back comes later by up to the same time again: TCP waits twice as long for each new attempt
    until_s = window.ended_s + RECOVERY_S + length_s
    met = record.begun_s <= until_s and record.ended_s >= window.begun_s
    return met and record.path in paths and record.status in statuses
