"""Threads that share requests: who sends, who waits, and what an end in the middle does to the others."""

import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from bilm_client import ClientClosedError, errors
from bilm_client._core.coalescing import SharedResults
from bilm_client._core.settings import NO_DEADLINE, Deadline
from bilm_client._transport.coalescing_sync import SyncCoalescing

from tests.support.shared_calls import AnsweringWire, WatchedDeadline, planned_job, texts_of

LIMIT_S = 60.0
NEVER_S = 3600.0
UNAVAILABLE = errors.UnavailableError("away", code=grpc.StatusCode.UNAVAILABLE)


Caller = Future[SharedResults | None]


class Threads:
    """A wire, what shares it, and calls in threads.

    So many requests are under way that others gather until they are 64 sentences.
    """

    def __init__(self, pool: ThreadPoolExecutor, wait_s: float = NEVER_S) -> None:
        self.pool = pool
        self.wire = AnsweringWire()
        self.coalescing = SyncCoalescing(wait_s, self.wire)
        self.first_callers = [self.submit(["first"] * 64, NO_DEADLINE) for _ in range(8)]
        self.first = [self.wire.next_call() for _ in range(8)]

    def finish_first(self) -> None:
        """End what is under way, so that nothing is any more."""
        for call in self.first:
            call.finish()

    def submit(self, sentences: Any, deadline: Deadline) -> Caller:
        return self.pool.submit(self.coalescing.embed, planned_job(sentences), deadline)

    def call(self, sentences: Any, at_s: float = math.inf) -> tuple[Caller, WatchedDeadline]:
        """Start a call, and return when it has joined its group."""
        deadline = WatchedDeadline(at_s)
        caller = self.submit(sentences, deadline)
        assert deadline.asked.wait(LIMIT_S)
        return caller, deadline

    def calls(self, *each: Any) -> list[Caller]:
        return [self.call(sentences)[0] for sentences in each]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as one:
        yield one


def tokens_of(future: Caller) -> list[list[str]]:
    shared = future.result(LIMIT_S)
    assert shared is not None
    return [list(result.embedding.tokens) for result in shared.results]


def test_a_lone_call_is_sent_at_once(pool: ThreadPoolExecutor) -> None:
    wire = AnsweringWire()
    caller = pool.submit(SyncCoalescing(NEVER_S, wire).embed, planned_job("a"), NO_DEADLINE)
    wire.next_call().finish()
    assert tokens_of(caller) == [["a"]]


def test_calls_that_come_meanwhile_go_together_when_nothing_is_under_way(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    callers = threads.calls("a", ["b", "c"])
    assert threads.wire.idle
    threads.finish_first()
    call = threads.wire.next_call()
    assert texts_of(call.request) == ["a", "b", "c"]
    call.finish()
    assert [tokens_of(caller) for caller in callers] == [[["a"]], [["b"], ["c"]]]


def test_a_group_is_sent_when_its_wait_is_over(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool, wait_s=0.01)
    [caller] = threads.calls("a")
    call = threads.wire.next_call()
    call.finish()
    assert tokens_of(caller) == [["a"]]
    threads.finish_first()


def test_a_full_group_is_sent_at_once_with_the_latest_deadline(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    callers = [threads.call([each] * 32, at_s)[0] for each, at_s in (("a", 1e9), ("b", 2e9))]
    call = threads.wire.next_call()
    assert texts_of(call.request) == ["a"] * 32 + ["b"] * 32
    assert call.deadline.at_s == 2e9
    call.finish()
    assert [len(tokens_of(caller)) for caller in callers] == [32, 32]
    threads.finish_first()


def test_a_callers_own_deadline_ends_its_call_alone(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    (hasty, deadline), (patient, _) = threads.call("a"), threads.call("b")
    threads.finish_first()
    call = threads.wire.next_call()
    assert texts_of(call.request) == ["a", "b"]
    deadline.passed.set()
    with pytest.raises(errors.DeadlineError):
        hasty.result(LIMIT_S)
    assert not call.cancelled.is_set()
    call.finish()
    assert tokens_of(patient) == [["b"]]


def test_the_request_is_cancelled_when_all_have_left(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    calls = [threads.call(["a"] * 32), threads.call(["b"] * 32)]
    call = threads.wire.next_call()
    for caller, deadline in calls:
        assert not call.cancelled.is_set()
        deadline.passed.set()
        with pytest.raises(errors.DeadlineError):
            caller.result(LIMIT_S)
    assert call.cancelled.wait(LIMIT_S)
    call.finish(errors.ServiceError("cancelled", code=grpc.StatusCode.CANCELLED))
    threads.finish_first()


def test_another_thread_sends_when_the_first_of_a_group_has_left(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    (hasty, deadline), (patient, _) = threads.call("a"), threads.call("b")
    deadline.passed.set()
    with pytest.raises(errors.DeadlineError):
        hasty.result(LIMIT_S)
    threads.finish_first()
    call = threads.wire.next_call()
    assert texts_of(call.request) == ["b"]
    call.finish()
    assert tokens_of(patient) == [["b"]]


def test_another_thread_sends_when_the_sending_one_is_interrupted(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    threads.wire.raises.append(KeyboardInterrupt())
    first, *others = threads.calls("a", "b", "c")
    threads.finish_first()
    assert isinstance(first.exception(LIMIT_S), KeyboardInterrupt)
    call = threads.wire.next_call()
    call.finish()
    assert [tokens_of(caller) for caller in others] == [[["b"]], [["c"]]]


def test_another_thread_sends_when_the_one_that_filled_the_group_is_interrupted(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    threads.wire.raises.append(KeyboardInterrupt())
    [first] = threads.calls("a")
    interrupted = threads.submit(["b"] * 63, NO_DEADLINE)
    assert isinstance(interrupted.exception(LIMIT_S), KeyboardInterrupt)
    threads.wire.next_call().finish()
    assert tokens_of(first) == [["a"]]
    threads.finish_first()


def test_a_lone_call_that_is_interrupted_leaves_the_others_alone(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    threads.wire.raises.append(KeyboardInterrupt())
    [interrupted] = threads.calls("a")
    threads.finish_first()
    assert isinstance(interrupted.exception(LIMIT_S), KeyboardInterrupt)
    caller = threads.submit("b", NO_DEADLINE)  # nothing is under way: it is sent at once
    threads.wire.next_call().finish()
    assert tokens_of(caller) == [["b"]]


def test_an_interrupt_ends_the_wait_of_one_call(pool: ThreadPoolExecutor) -> None:
    threads, deadline = Threads(pool), WatchedDeadline(math.inf)

    def interrupt() -> None:
        assert deadline.asked.wait(LIMIT_S)
        os.kill(os.getpid(), signal.SIGINT)  # to the main thread, this one

    interrupter = pool.submit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        threads.coalescing.embed(planned_job("a"), deadline)
    interrupter.result(LIMIT_S)
    [other] = threads.calls("b")
    threads.finish_first()
    call = threads.wire.next_call()
    assert texts_of(call.request) == ["b"]
    call.finish()
    assert tokens_of(other) == [["b"]]


def test_what_cannot_be_sent_fails_for_all(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    threads.wire.raises.append(ClientClosedError("closed"))
    callers = threads.calls("a", "b")
    threads.finish_first()
    for caller in callers:
        with pytest.raises(ClientClosedError):
            caller.result(LIMIT_S)


def test_a_failure_goes_to_all(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    callers = threads.calls(["a"] * 32, ["b"] * 32)
    threads.wire.next_call().finish(UNAVAILABLE)
    for caller in callers:
        with pytest.raises(errors.UnavailableError):
            caller.result(LIMIT_S)
    threads.finish_first()


def test_closing_ends_what_gathers(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool)
    callers = threads.calls("a", "b")
    threads.coalescing.close()
    for caller in callers:
        with pytest.raises(ClientClosedError):
            caller.result(LIMIT_S)
    threads.finish_first()
    assert [len(tokens_of(caller)) for caller in threads.first_callers] == [64] * 8
    assert threads.wire.idle
