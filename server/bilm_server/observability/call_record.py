"""The record of a call: for the access log, the metrics and the traces. Never the caller's text."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Protocol

from bilm_api.constants import MAX_REQUEST_ID_CHARACTERS, NO_LOG_KEY, REQUEST_ID_KEY, Priority

from bilm_server.errors import Code

UNKNOWN_METHOD = "unknown"
"""What a call is named whose method doesn't exist; the name that it gave is the caller's text."""

Metadata = Sequence[tuple[str, str | bytes]]


def caller_request_id(metadata: Metadata) -> str:
    """Return the caller's name of a call: printable ASCII, 64 characters at most; "" if there is no such one."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and len(value) <= MAX_REQUEST_ID_CHARACTERS:
            return value if value.isascii() and value.isprintable() else ""
    return ""


def is_marked(metadata: Metadata) -> bool:
    """Return whether a call is marked as a test; whether that counts is a right of its caller."""
    return NO_LOG_KEY in [key for key, _ in metadata]


class Held:
    """What a call holds of the server: what is added last is given back first. Closing is idempotent."""

    def __init__(self) -> None:
        self._releases: list[Callable[[], None]] = []
        self._closed = False

    def add(self, release: Callable[[], None]) -> None:
        """Hold something until `close`, which gives it back by calling `release`; that must not raise.

        A call that is over, and doesn't know it yet, holds nothing any more: that is given back at once.
        """
        if self._closed:
            release()
        else:
            self._releases.append(release)

    def close(self) -> None:
        """Give everything back."""
        self._closed = True
        while self._releases:
            self._releases.pop()()


@dataclass(eq=False)
class CallRecord:
    """One guarded call.

    Attributes:
        method: of our service, without it; of another one with its service; `UNKNOWN_METHOD`.
        peer: as grpc names it.
        metadata: the caller's; never logged.
        request_id: the caller's name of the call, "" without one.
        request_bytes: of a unary call's message, once it is there.
        model: name of the model that the call is for, once that is known; "" for one that isn't served.
        caller: who it is, once that is known; an address where nothing better is.
        priority: of its sentences: its caller's ceiling, or what it asks for where that is lower.
        is_test: whether its caller marked it so and may; False until it is known who calls.
        code: at its end.
        reason: of a refusal of the whole call.
        sentences: that were asked for.
        failed_sentences: of them, those that ended in an error.
        tokens: that were computed.
        queue_s: longest of its sentences.
        inference_s: longest of its sentences.
        duration_s: of the whole call, at its end.
        held: what it holds of the server, to be given back once the response is sent, not only computed.
    """

    method: str
    peer: str
    metadata: Metadata = ()
    request_id: str = ""
    request_bytes: int = 0
    model: str = ""
    caller: str = ""
    priority: Priority = Priority.INTERACTIVE
    is_test: bool = False
    code: Code | None = None
    reason: str = ""
    sentences: int = 0
    failed_sentences: int = 0
    tokens: int = 0
    queue_s: float = 0.0
    inference_s: float = 0.0
    duration_s: float = 0.0
    held: Held = field(default_factory=Held)

    def computed(self, tokens: int, queue_s: float, inference_s: float, sentences: int = 1) -> None:
        """Count sentences that were computed: tokens of all of them, the longest times of any."""
        self.sentences += sentences
        self.tokens += tokens
        self.queue_s = max(self.queue_s, queue_s)
        self.inference_s = max(self.inference_s, inference_s)

    def sentence_failed(self) -> None:
        """Count a sentence that ended in an error."""
        self.sentences += 1
        self.failed_sentences += 1


class CallObserver(Protocol):
    """Sees every call begin and end, on the event loop; also those that are refused."""

    def begin(self, call: CallRecord) -> None:
        """Before anything else is done; nothing but method, peer, metadata and `request_id` is known."""

    def end(self, call: CallRecord) -> None:
        """After everything else, however the call ended."""


_current: ContextVar[CallRecord] = ContextVar("call")


def current_call() -> CallRecord:
    """Return the call that the running task belongs to.

    Raises:
        LookupError: outside of a call.
    """
    return _current.get()


def request_arrived(n_bytes: int) -> None:
    """Note the size of the running call's message, unless nothing records the call."""
    call = _current.get(None)
    if call is not None:
        call.request_bytes = n_bytes


def enter(call: CallRecord) -> "Token[CallRecord]":
    """Make a call the current one, until `leave`."""
    return _current.set(call)


def leave(token: "Token[CallRecord]") -> None:
    """Make the call the current one that was so before `enter`."""
    _current.reset(token)
