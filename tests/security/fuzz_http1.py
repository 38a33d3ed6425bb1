"""HTTP/1.1 as a client that may send anything, and that reads responses strictly."""

import contextlib
import json
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bilm_api.constants import Reason

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [ -~]*")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([ -~]*)")
_STATUSES = {200, 304, 400, 401, 404, 405, 408, 413, 415, 417, 421, 429, 431, 503, 504}
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: the connection ends with a reset."""


class MalformedResponseError(Exception):
    """What came back is no HTTP/1.1."""


@dataclass(frozen=True)
class HttpCase:
    """What a connection to the HTTP door sends.

    Attributes:
        data: all of it.
        expected: how many responses must come, unless the server refuses the whole connection.
        settles: whether to wait, before the end is said, until the server has no more to say.
        leaves: whether the client resets the connection instead of reading.
    """

    data: bytes
    expected: int = 0
    settles: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class Response:
    """A response; of HEAD it has no body.

    Attributes:
        status: its code.
        headers: by lower-case name.
        body: whole.
    """

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class HttpReply:
    """What the server said.

    Attributes:
        responses: whole ones, without 100.
        malformed: what is wrong with what came, "" if nothing is.
        closed: whether the server closed the connection.
    """

    responses: list[Response] = field(default_factory=list)
    malformed: str = ""
    closed: bool = False


def exchange(address: tuple[str, int], case: HttpCase, timeout_s: float, silence_s: float) -> HttpReply:
    """Send, read until every expected response has come, say that nothing more comes, and read to the end."""
    reply = HttpReply()
    with socket.create_connection(address, timeout_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        transfer = _Transfer(connection, reply, time.monotonic() + timeout_s)
        if case.leaves:
            transfer.send(case.data)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            reply.closed = True
            return reply
        transfer.run(case.data, case.expected)
        if case.settles:
            transfer.run(b"", None, silence_s)
        if not reply.closed:
            with contextlib.suppress(OSError):  # closed by the server meanwhile; the next read tells
                connection.shutdown(socket.SHUT_WR)
            transfer.run(b"", None)
    return reply


class _Transfer:
    """Sends and reads at the same time, so that neither side waits for the other."""

    def __init__(self, connection: socket.socket, reply: HttpReply, end_s: float) -> None:
        self._connection, self._reply, self._end_s = connection, reply, end_s
        self._received = b""

    def send(self, data: bytes) -> None:
        """Send as much as the server takes at once."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._connection.send(data)

    def run(self, data: bytes, n_responses: int | None, silence_s: float = 1e9) -> None:
        """Send, and read until so many responses have come (None: to the end), or until nothing comes."""
        unsent = memoryview(data)
        while not self._reply.closed and (unsent or n_responses is None or len(self._reply.responses) < n_responses):
            left_s = max(min(self._end_s - time.monotonic(), silence_s), 0.0)
            writing = [self._connection] if unsent else []
            readable, writable, _ = select.select([self._connection], writing, [], left_s)
            if not readable and not writable:
                return
            try:
                if writable:
                    unsent = unsent[self._connection.send(unsent) :]
                if readable:
                    self._feed(self._connection.recv(2**20))
            except (BrokenPipeError, ConnectionResetError):
                self._feed(b"")

    def _feed(self, data: bytes) -> None:
        self._received += data
        self._reply.closed = not data
        try:
            self._reply.responses = list(read_responses(self._received, closed=not data))
        except MalformedResponseError as error:
            self._reply.malformed, self._reply.closed = str(error), True


def read_responses(data: bytes, *, closed: bool) -> Iterator[Response]:
    """Yield the whole responses in what came; a cut one is none.

    Raises:
        MalformedResponseError: it isn't HTTP/1.1 as this server writes it.
    """
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return
        lines = head.split(b"\r\n")
        status = _STATUS_LINE.fullmatch(lines[0])
        found = [_HEADER_LINE.fullmatch(line) for line in lines[1:]]
        if status is None or not all(found):
            raise MalformedResponseError(f"no head of a response: {head[:200]!r}")
        headers = {one[1].decode().lower(): one[2].decode() for one in found if one is not None}
        if status[1] == b"100":
            data = rest
            continue
        if status[1] == b"304":
            length = 0  # what `content-length` says is that of the response with status 200
        elif "content-length" in headers:
            length = 0 if rest.startswith(b"HTTP/1.1 ") else int(headers["content-length"])  # that of HEAD has no body
        elif not closed:
            return
        else:
            length = len(rest)
        if len(rest) < length and not (closed and not rest):
            return
        yield Response(int(status[1]), headers, rest[:length])
        data = rest[length:]


def http_complaints(case: HttpCase, reply: HttpReply) -> Iterator[str]:
    """Say what is wrong with a reply."""
    if not reply.closed:
        yield "the connection is still open"
    if reply.malformed:
        yield reply.malformed
    if not case.leaves and len(reply.responses) < case.expected:
        yield f"{len(reply.responses)} responses to {case.expected} requests"
    for response in reply.responses:
        yield from _judge(response)


def _judge(response: Response) -> Iterator[str]:
    if response.status not in _STATUSES:
        yield f"a response has the status {response.status}: {response.body[:300]!r}"
    if response.headers.get("content-type") != "application/json" or not response.body:
        return
    try:
        found = json.loads(response.body)
    except ValueError:
        yield f"a response isn't JSON: {response.body[:300]!r}"
        return
    errors = [found["error"]] if response.status != 200 else [item.get("error") for item in found.get("results", ())]
    for error in errors:
        if error is not None and error["code"] not in _CLIENT_REASONS:
            yield f"an error has the code {error['code']}: {error['message']}"


_CLIENT_REASONS = {reason.value for reason in Reason} - {"INTERNAL", "MODEL_FAILING"}
