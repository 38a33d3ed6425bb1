"""Tasks that share requests."""

import asyncio
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import ClientClosedError, errors
from bilm_client._core.coalescing import SharedResults
from bilm_client._core.settings import NO_DEADLINE, Deadline
from bilm_client._transport.coalescing_async import AsyncCoalescing

from tests.support.shared_calls import SERVICE, planned_job, texts_of

NEVER_S = 3600.0
Caller = asyncio.Task[SharedResults | None]


class Tasks:
    """A wire that the test answers, and calls in tasks; each has joined its group after `joined`."""

    def __init__(self, wait_s: float = NEVER_S) -> None:
        self.coalescing = AsyncCoalescing(wait_s, self.embed)
        self.calls: asyncio.Queue[tuple[pb.EmbedRequest, asyncio.Future[pb.EmbedResponse]]] = asyncio.Queue()
        self.deadlines: list[Deadline] = []

    async def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        answer: asyncio.Future[pb.EmbedResponse] = asyncio.get_running_loop().create_future()
        self.deadlines.append(deadline)
        self.calls.put_nowait((request, answer))
        return await answer

    def call(self, sentences: Any, timeout_s: float | None = None) -> Caller:
        deadline = NO_DEADLINE if timeout_s is None else Deadline.after(timeout_s)
        return asyncio.ensure_future(self.coalescing.embed(planned_job(sentences), deadline))

    async def busy(self, *sentences: Any) -> tuple["Answers", list[Caller]]:
        """Return what is under way, so much that others gather until they are 64 sentences, and calls that gather."""
        for _ in range(8):
            self.call(["first"] * 64)
        first = [await self.calls.get() for _ in range(8)]
        callers = [self.call(each) for each in sentences]
        for _ in range(3):  # the tasks' first steps, and the joining behind them
            await asyncio.sleep(0)
        return first, callers


Answers = list[tuple[pb.EmbedRequest, asyncio.Future[pb.EmbedResponse]]]


def finish(calls: Answers) -> None:
    for request, answer in calls:
        answer.set_result(SERVICE.embed(request))


async def tokens_of(caller: Caller) -> list[list[str]]:
    shared = await caller
    assert shared is not None
    return [list(result.embedding.tokens) for result in shared.results]


async def test_a_lone_call_is_sent_at_once() -> None:
    tasks = Tasks()
    caller = tasks.call("a")
    finish([await tasks.calls.get()])
    assert await tokens_of(caller) == [["a"]]


async def test_calls_that_are_made_at_once_are_eight_requests() -> None:
    tasks = Tasks()
    callers = [tasks.call(f"w{n}") for n in range(64)]
    for _ in range(8):
        request, answer = await tasks.calls.get()
        assert len(request.sentences) == 8
        answer.set_result(SERVICE.embed(request))
    assert [await tokens_of(caller) for caller in callers] == [[[f"w{n}"]] for n in range(64)]


async def test_calls_that_come_meanwhile_go_together_when_nothing_is_under_way() -> None:
    tasks = Tasks()
    first, callers = await tasks.busy("a", "b")
    assert tasks.calls.empty()
    finish(first)
    request, answer = await tasks.calls.get()
    assert texts_of(request) == ["a", "b"]
    answer.set_result(SERVICE.embed(request))
    assert [await tokens_of(caller) for caller in callers] == [[["a"]], [["b"]]]


async def test_a_caller_that_calls_again_at_once_joins_what_gathers() -> None:
    tasks = Tasks()

    async def twice() -> None:
        for sentences in (["first"] * 64, "again"):
            await tasks.coalescing.embed(planned_job(sentences), NO_DEADLINE)

    caller = asyncio.ensure_future(twice())
    own = await tasks.calls.get()
    first, [other] = await tasks.busy("a")
    finish([own])
    for _ in range(3):
        await asyncio.sleep(0)
    finish(first)
    request, answer = await tasks.calls.get()
    assert texts_of(request) == ["a", "again"]
    answer.set_result(SERVICE.embed(request))
    await asyncio.gather(caller, other)


async def test_a_group_is_sent_when_its_wait_is_over() -> None:
    tasks = Tasks(wait_s=0.01)
    await tasks.busy("a")
    request, _ = await tasks.calls.get()
    assert texts_of(request) == ["a"]


async def test_a_full_group_is_sent_at_once_with_the_latest_deadline() -> None:
    tasks = Tasks()
    await tasks.busy()
    callers = [tasks.call(["a"] * 32, 1000.0), tasks.call(["b"] * 32, 2000.0)]
    request, answer = await tasks.calls.get()
    assert texts_of(request) == ["a"] * 32 + ["b"] * 32
    left_s = tasks.deadlines[-1].remaining_s()
    assert left_s is not None
    assert left_s > 1000.0
    answer.set_result(SERVICE.embed(request))
    assert [len(await tokens_of(caller)) for caller in callers] == [32, 32]


async def test_a_callers_own_deadline_ends_its_call_alone() -> None:
    tasks = Tasks()
    await tasks.busy()
    hasty, patient = tasks.call("a", 0.05), tasks.call(["b"] * 63)
    request, answer = await tasks.calls.get()
    with pytest.raises(errors.DeadlineError):
        await hasty
    answer.set_result(SERVICE.embed(request))
    assert await tokens_of(patient) == [["b"]] * 63


async def test_cancelling_a_caller_leaves_the_others_alone() -> None:
    tasks = Tasks()
    await tasks.busy()
    callers = [tasks.call("a"), tasks.call(["b"] * 63)]
    request, answer = await tasks.calls.get()
    callers[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await callers[0]
    answer.set_result(SERVICE.embed(request))
    assert await tokens_of(callers[1]) == [["b"]] * 63


async def test_the_request_is_cancelled_when_all_have_left() -> None:
    tasks = Tasks()
    await tasks.busy()
    callers = [tasks.call("a"), tasks.call(["b"] * 63, 0.05)]
    _, answer = await tasks.calls.get()
    callers[0].cancel()
    await asyncio.wait(callers)
    await asyncio.sleep(0)
    assert answer.cancelled()


async def test_a_call_that_left_is_not_sent() -> None:
    tasks = Tasks()
    first, callers = await tasks.busy("a", "b")
    callers[0].cancel()
    await asyncio.wait(callers[:1])
    finish(first)
    request, _ = await tasks.calls.get()
    assert texts_of(request) == ["b"]


@pytest.mark.parametrize(
    "error", [errors.UnavailableError("away", code=grpc.StatusCode.UNAVAILABLE), ValueError("unexpected")]
)
async def test_a_failure_goes_to_all(error: Exception) -> None:
    tasks = Tasks()
    await tasks.busy()
    callers = [tasks.call("a"), tasks.call(["b"] * 63)]
    _, answer = await tasks.calls.get()
    answer.set_exception(error)
    for caller in callers:
        with pytest.raises(type(error)):
            await caller


async def test_a_shared_request_that_something_else_cancels_cancels_no_task() -> None:
    tasks = Tasks()
    await tasks.busy()
    callers = [tasks.call("a"), tasks.call(["b"] * 63)]
    _, answer = await tasks.calls.get()
    answer.cancel()
    for caller in callers:
        with pytest.raises(errors.ServiceError) as caught:
            await caller
        assert caught.value.code is grpc.StatusCode.CANCELLED


async def test_closing_ends_what_gathers() -> None:
    tasks = Tasks()
    first, callers = await tasks.busy("a", "b")
    tasks.coalescing.close()
    for caller in callers:
        with pytest.raises(ClientClosedError):
            await caller
    finish(first)
    assert tasks.calls.empty()
