"""As much HTTP/2 as it takes to speak wrongly: frames, header blocks and gRPC messages by hand, and reading replies.

A client library would refuse to send most of this.
"""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20
MAX_FRAME_BYTES = 16384
_HEADER_BYTES = 9
INITIAL_WINDOW = 4

Done = Callable[[], bool]
Headers = list[tuple[bytes, bytes]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame; `length` is what it claims to carry, where that is a lie."""
    claimed = len(payload) if length is None else length
    return struct.pack(">I", claimed & 0xFFFFFF)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def opening() -> bytes:
    """What a well-behaved client begins with; windows wide enough for all answers to come."""
    return PREFACE + settings((INITIAL_WINDOW, 2**20)) + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**24))


def integer(value: int, prefix_bits: int, first: int = 0) -> bytes:
    """HPACK's integers (RFC 7541, 5.1)."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes([first | value])
    encoded, value = [first | limit], value - limit
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    return bytes([*encoded, value])


def header_block(headers: Headers) -> bytes:
    """Literals without indexing: what one block holds says nothing about the next."""
    return b"".join(b"\0" + integer(len(n), 7) + n + integer(len(v), 7) + v for n, v in headers)


def call_headers(path: bytes, *more: tuple[bytes, bytes]) -> Headers:
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    ]


def header_frames(stream: int, block: bytes, flags: int = 0) -> bytes:
    """HEADERS, and CONTINUATION for what doesn't fit."""
    parts = [block[i : i + MAX_FRAME_BYTES] for i in range(0, max(len(block), 1), MAX_FRAME_BYTES)]
    frames = [frame(HEADERS, flags | (END_HEADERS if len(parts) == 1 else 0), stream, parts[0])]
    for i, part in enumerate(parts[1:], 2):
        frames.append(frame(CONTINUATION, END_HEADERS if i == len(parts) else 0, stream, part))
    return b"".join(frames)


def message(body: bytes, compressed: int = 0, length: int | None = None) -> bytes:
    """A gRPC message; `length` is what its prefix claims."""
    return struct.pack(">BI", compressed, (len(body) if length is None else length) & 0xFFFFFFFF) + body


def messages(body: bytes) -> list[bytes]:
    """The gRPC messages of a reply."""
    found = []
    while len(body) >= 5:
        end = 5 + int.from_bytes(body[1:5], "big")
        found.append(body[5:end])
        body = body[end:]
    return found


def data_frames(stream: int, data: bytes, flags: int = END_STREAM) -> bytes:
    parts = [data[i : i + MAX_FRAME_BYTES] for i in range(0, max(len(data), 1), MAX_FRAME_BYTES)]
    return b"".join(frame(DATA, flags if i == len(parts) else 0, stream, part) for i, part in enumerate(parts, 1))


def call(stream: int, path: bytes, body: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A whole call of one message."""
    return header_frames(stream, header_block(call_headers(path, *more))) + data_frames(stream, message(body))


@dataclass
class Reply:
    """What the server said.

    Attributes:
        statuses: grpc-status and grpc-message of each stream that ended in trailers.
        http: `:status` of each stream that got headers.
        resets: the error code of each stream that was reset.
        goaway: the error code of a GOAWAY.
        ended: streams that have ended, in whichever way.
        bodies: the DATA of each stream.
        closed: whether the server closed the connection.
        refused: whether it did so before the end was said.
    """

    statuses: dict[int, tuple[int, str]] = field(default_factory=dict)
    http: dict[int, str] = field(default_factory=dict)
    resets: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    bodies: dict[int, bytes] = field(default_factory=dict)
    goaway: int | None = None
    closed: bool = False
    refused: bool = False


class Connection:
    """A TCP connection, as a context manager; what is sent on it need not be HTTP/2."""

    def __init__(self, address: tuple[str, int], timeout_s: float) -> None:
        self.reply = Reply()
        self._address, self._timeout_s = address, timeout_s
        self._decoder, self._buffer, self._block = Decoder(), b"", b""
        self._decoder.max_header_list_size = 2**20
        self._socket: socket.socket | None = None

    def __enter__(self) -> "Connection":
        self._socket = socket.create_connection(self._address, self._timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._socket is not None
        self._socket.close()

    def exchange(self, data: bytes, expected: tuple[int, ...] = (), silence_s: float = 0.0) -> Reply:
        """Sends, reads until every expected stream has ended, says that nothing more comes, reads to the end.

        Args:
            data: to send.
            expected: streams to wait for.
            silence_s: then go on reading until nothing has come for so long.
        """
        assert self._socket is not None
        end_s = time.monotonic() + self._timeout_s
        self._transfer(data, end_s, lambda: all(stream in self.reply.ended for stream in expected))
        if silence_s:
            self._transfer(b"", end_s, lambda: False, silence_s)
        self.reply.refused = self.reply.closed
        if not self.reply.closed:
            with contextlib.suppress(OSError):  # closed by the server meanwhile; the next read tells
                self._socket.shutdown(socket.SHUT_WR)
            self._transfer(b"", end_s, lambda: False)
        return self.reply

    def _transfer(self, data: bytes, end_s: float, done: Done, silence_s: float = 1e9) -> None:
        assert self._socket is not None
        unsent = memoryview(data)
        while not self.reply.closed and (unsent or not done()):
            left_s = max(min(end_s - time.monotonic(), silence_s), 0.0)
            readable, writable, _ = select.select([self._socket], [self._socket] if unsent else [], [], left_s)
            if not readable and not writable:
                return
            try:
                if writable:
                    unsent = unsent[self._socket.send(unsent) :]
                if readable:
                    self._feed(self._socket.recv(65536))
            except (BrokenPipeError, ConnectionResetError):
                self.reply.closed = True

    def _feed(self, data: bytes) -> None:
        if not data:
            self.reply.closed = True
        self._buffer += data
        while len(self._buffer) >= _HEADER_BYTES:
            length = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < _HEADER_BYTES + length:
                return
            kind, flags, stream = struct.unpack(">BBI", self._buffer[3:_HEADER_BYTES])
            payload = self._buffer[_HEADER_BYTES : _HEADER_BYTES + length]
            self._buffer = self._buffer[_HEADER_BYTES + length :]
            self._read_frame(kind, flags, stream, payload)

    def _read_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        reply = self.reply
        if kind == GOAWAY:
            reply.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == RST_STREAM:
            reply.resets[stream] = int.from_bytes(payload, "big")
            reply.ended.add(stream)
        elif kind in {HEADERS, CONTINUATION}:
            self._block += payload
            if flags & END_HEADERS:
                self._read_headers(stream)
        elif kind == DATA:
            reply.bodies[stream] = reply.bodies.get(stream, b"") + payload
        if kind in {HEADERS, DATA} and flags & END_STREAM:
            reply.ended.add(stream)

    def _read_headers(self, stream: int) -> None:
        headers = {_text(name): _text(value) for name, value in self._decoder.decode(self._block, raw=True)}
        self._block = b""
        if ":status" in headers:
            self.reply.http[stream] = headers[":status"]
        if "grpc-status" in headers:
            self.reply.statuses[stream] = int(headers["grpc-status"]), headers.get("grpc-message", "")


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
