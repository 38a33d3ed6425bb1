"""What the tests of calls that share requests have in common: jobs, a wire that the test answers, watched deadlines."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.coalescing import CallGroup, Coalescer, SharedCall, SharedResults
from bilm_client._core.job import EmbedJob, embed_job
from bilm_client._core.keywords import EmbedArguments
from bilm_client._core.settings import NO_DEADLINE, Deadline, Settings, deadline_passed
from bilm_client.results import ModelInfo
from bilm_client.testing.service import FakeService

SERVICE = FakeService()
INFO = ModelInfo.from_proto(SERVICE.get_model())
SETTINGS = Settings(target="nowhere")
WAIT_S = 0.005
_MOMENT_S = 0.02


def planned_job(sentences: Any, info: ModelInfo = INFO, settings: Settings = SETTINGS, **options: Any) -> EmbedJob:
    """Return the job of an `embed`, planned for a model."""
    job = embed_job(settings, sentences, EmbedArguments(**options))
    job.plan(info)
    return job


def texts_of(request: pb.EmbedRequest) -> list[str]:
    """Return the sentences of a request, tokens joined by spaces."""
    return [sentence.text or " ".join(sentence.tokens.tokens) for sentence in request.sentences]


@dataclass(frozen=True)
class WatchedDeadline(Deadline):
    """A deadline that passes when the test says so.

    Attributes:
        asked: Set when the call asks what is left, which it does after it has joined a group.
        passed: Set by the test.
    """

    asked: threading.Event = field(default_factory=threading.Event)
    passed: threading.Event = field(default_factory=threading.Event)

    def remaining_s(self) -> float | None:
        """Return a moment, after which it is asked for again.

        Raises:
            DeadlineError: It has passed.
        """
        self.asked.set()
        if self.passed.is_set():
            raise deadline_passed()
        return _MOMENT_S


class AnsweredCall:
    """A `PendingEmbed` that the test ends."""

    def __init__(self, request: pb.EmbedRequest, deadline: Deadline) -> None:
        self.request = request
        self.deadline = deadline
        self.cancelled = threading.Event()
        self._outcome: pb.EmbedResponse | Exception | None = None
        self._callbacks: list[Callable[[], None]] = []
        self.ended = threading.Event()

    def finish(self, outcome: pb.EmbedResponse | Exception | None = None) -> None:
        """End the call; without an outcome as the fake service does."""
        self._outcome = SERVICE.embed(self.request) if outcome is None else outcome
        self.ended.set()
        for callback in self._callbacks:
            callback()

    def result(self) -> pb.EmbedResponse:
        """See `PendingEmbed`."""
        if isinstance(self._outcome, pb.EmbedResponse):
            return self._outcome
        raise self._outcome or AssertionError("asked for a result before the end")

    def when_done(self, callback: Callable[[], None]) -> None:
        """See `PendingEmbed`."""
        self._callbacks.append(callback)

    def cancel(self) -> None:
        """See `PendingEmbed`."""
        self.cancelled.set()


class AnsweringWire:
    """Makes calls that the test ends, in the order in which they come.

    Attributes:
        raises: Raised, one at a time, instead of starting a call.
    """

    def __init__(self) -> None:
        self.raises: list[BaseException] = []
        self._calls: SimpleQueue[AnsweredCall] = SimpleQueue()

    def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        """See `SyncTransport`."""
        call = self.start_embed(request, deadline)
        if not call.ended.wait(60):
            raise TimeoutError("the test ended no call")
        return call.result()

    def start_embed(self, request: pb.EmbedRequest, deadline: Deadline) -> AnsweredCall:
        """See `SyncTransport`."""
        if self.raises:
            raise self.raises.pop(0)
        call = AnsweredCall(request, deadline)
        self._calls.put(call)
        return call

    def next_call(self) -> AnsweredCall:
        """Wait for the next call."""
        return self._calls.get(timeout=60)

    @property
    def idle(self) -> bool:
        """Whether no call waits to be taken."""
        return self._calls.empty()


class CountedWaiter:
    """A `Waiter` that counts."""

    def __init__(self) -> None:
        self.count = 0

    def wake(self) -> None:
        """See `Waiter`."""
        self.count += 1


def call_of(sentences: Any, deadline: Deadline = NO_DEADLINE, **options: Any) -> SharedCall:
    """Return a call with a waiter that counts."""
    return SharedCall(planned_job(sentences, **options), deadline, CountedWaiter())


class BusyCoalescer(Coalescer):
    """Has so many requests under way that a group is full at 64 sentences.

    Args:
        kinds: The options of those requests.
    """

    def __init__(self, *kinds: dict[str, Any]) -> None:
        super().__init__(WAIT_S)
        self.under_way = [call_of(["x"] * 64, **options) for options in kinds or [{}] for _ in range(8)]
        for call in self.under_way:
            assert joined(self, call) == [group_of(call)]
            assert self.take(group_of(call))


def group_of(call: SharedCall) -> CallGroup:
    """Return the group of a call that has joined one."""
    assert call.group is not None
    return call.group


def joined(coalescer: Coalescer, *calls: SharedCall, now_s: float = 0.0) -> list[CallGroup]:
    """Let calls join one after another; return the groups that are full."""
    return [full for call in calls for full in coalescer.join([call], now_s)]


def sent(coalescer: Coalescer, group: CallGroup) -> pb.EmbedRequest:
    """Take a group, and return its request."""
    assert coalescer.take(group)
    return group.request()


def taken(call: SharedCall) -> Sequence[pb.EmbedResult]:
    """Return the results of a call."""
    shared = call.take()
    assert isinstance(shared, SharedResults)
    return shared.results
