"""Calls of one client in many tasks of a loop, sent together."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.coalescing import CallGroup, Coalescer, SharedCall, SharedResults, may_share
from bilm_client._core.job import EmbedJob
from bilm_client._core.settings import Deadline, deadline_passed
from bilm_client.errors import ClientClosedError, ServiceError

EmbedCoroutine = Callable[[pb.EmbedRequest, Deadline], Coroutine[Any, Any, pb.EmbedResponse]]


class AsyncCoalescing:
    """Embeds jobs that share requests, each request in a task of its own.

    Args:
        wait_s: The longest wait of a call for others.
        embed: Makes an Embed call.
    """

    def __init__(self, wait_s: float, embed: EmbedCoroutine) -> None:
        self._wait_s = wait_s
        self._embed = embed
        self._coalescer = Coalescer(wait_s)
        self._made: list[SharedCall] = []  # in this round of the loop
        self._under_way: dict[CallGroup, asyncio.Task[pb.EmbedResponse]] = {}

    def accepts(self, job: EmbedJob, deadline: Deadline) -> bool:
        """Return whether a job may share its request."""
        return may_share(job, deadline, time.monotonic() + self._wait_s)

    async def embed(self, job: EmbedJob, deadline: Deadline) -> SharedResults | None:
        """Wait for the results of a job; None: it is to be sent by itself.

        Raises:
            DeadlineError: The call's own deadline passed.
            BilmError: The shared request failed.
        """
        waiter = _TaskWaiter(asyncio.get_running_loop())
        call = SharedCall(job, deadline, waiter)
        try:
            self._add(call)
            await waiter.wait(deadline.remaining_s())
        finally:
            self._leave(call)
        return call.take()

    def close(self) -> None:
        """End the calls that weren't sent yet with ClientClosedError."""
        self._join()
        self._coalescer.close(ClientClosedError("the client was closed during the call"))

    def _add(self, call: SharedCall) -> None:
        if not self._made:  # tasks that are ready to run may make more calls
            asyncio.get_running_loop().call_soon(self._join)
        self._made.append(call)

    def _join(self) -> None:
        calls, self._made = self._made, []
        now_s, loop = time.monotonic(), asyncio.get_running_loop()
        for group in self._coalescer.join(calls, now_s):
            self._send(group)
        for call in calls:
            if call.group is not None and math.isfinite(call.sends_at_s):
                loop.call_later(call.sends_at_s - now_s, self._send, call.group)

    def _send(self, group: CallGroup) -> None:
        if self._coalescer.take(group):
            task = asyncio.ensure_future(self._request(group))
            self._under_way[group] = task
            task.add_done_callback(partial(self._receive, group))

    async def _request(self, group: CallGroup) -> pb.EmbedResponse:
        return await self._embed(group.request(), group.deadline)

    def _receive(self, group: CallGroup, task: asyncio.Task[pb.EmbedResponse]) -> None:
        del self._under_way[group]
        loop = asyncio.get_running_loop()
        for due in self._coalescer.end(group, _outcome(task)):
            loop.call_soon(self._send, due)

    def _leave(self, call: SharedCall) -> None:
        self._coalescer.leave(call)
        if call in self._made:
            self._made.remove(call)
        if call.group is not None and call.group.ended and call.group in self._under_way:
            self._under_way[call.group].cancel()


class _TaskWaiter:
    """The wait of one task."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._woken = loop.create_future()

    def wake(self) -> None:
        """End the wait."""
        if not self._woken.done():
            self._woken.set_result(None)

    async def wait(self, timeout_s: float | None) -> None:
        """Wait for `wake`.

        Raises:
            DeadlineError: It doesn't come in time.
        """
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, self._expire)
        try:
            await self._woken
        finally:
            if timer is not None:
                timer.cancel()

    def _expire(self) -> None:
        if not self._woken.done():
            self._woken.set_exception(deadline_passed())


def _outcome(task: asyncio.Task[pb.EmbedResponse]) -> pb.EmbedResponse | Exception:
    if task.cancelled():
        return ServiceError("the shared request was cancelled", code=grpc.StatusCode.CANCELLED)
    error = task.exception()
    if error is None:
        return task.result()
    return error if isinstance(error, Exception) else RuntimeError(f"the shared request ended by {error!r}")
