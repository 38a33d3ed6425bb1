"""Calls of one client in many threads, sent together. It has no thread: a group's first caller sends the request."""

import os
import threading
import time
from functools import partial
from typing import Protocol

from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.coalescing import CallGroup, Coalescer, SharedCall, SharedResults, may_share
from bilm_client._core.job import EmbedJob
from bilm_client._core.settings import Deadline
from bilm_client._transport.base import PendingEmbed
from bilm_client.errors import ClientClosedError


class EmbedCalls(Protocol):
    """Of a `SyncTransport`, what makes Embed calls."""

    def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse: ...
    def start_embed(self, request: pb.EmbedRequest, deadline: Deadline) -> PendingEmbed: ...


class SyncCoalescing:
    """Embeds jobs that share requests; a forked process begins with none.

    Args:
        wait_s: The longest wait of a call for others.
        transport: Makes the calls.
    """

    def __init__(self, wait_s: float, transport: EmbedCalls) -> None:
        self._wait_s = wait_s
        self._transport = transport
        self._groups: dict[int, _Groups] = {}  # by process

    def accepts(self, job: EmbedJob, deadline: Deadline) -> bool:
        """Return whether a job may share its request."""
        return may_share(job, deadline, time.monotonic() + self._wait_s)

    def embed(self, job: EmbedJob, deadline: Deadline) -> SharedResults | None:
        """Wait for the results of a job; None: it is to be sent by itself.

        Raises:
            DeadlineError: The call's own deadline passed.
            BilmError: The shared request failed.
        """
        return self._here().embed(job, deadline)

    def close(self) -> None:
        """End the calls that weren't sent yet with ClientClosedError."""
        self._here().close()

    def _here(self) -> "_Groups":
        process_id = os.getpid()
        groups = self._groups.get(process_id)
        if groups is None:  # setdefault is atomic: threads agree on one
            groups = self._groups.setdefault(process_id, _Groups(self._wait_s, self._transport))
        return groups


class _Groups:
    """The groups of one client in one process.

    A call's thread waits for the call's end; the thread of a group's first call waits for the time to send it, too.
    The thread that fills a group sends it.
    """

    def __init__(self, wait_s: float, transport: EmbedCalls) -> None:
        self._transport = transport
        self._lock = threading.RLock()  # a signal handler may close the client
        self._coalescer = Coalescer(wait_s)
        self._under_way: dict[CallGroup, PendingEmbed | None] = {}  # None: it has no future, or not yet

    def embed(self, job: EmbedJob, deadline: Deadline) -> SharedResults | None:
        waiter = _ThreadWaiter()
        call = SharedCall(job, deadline, waiter)
        try:
            with self._lock:
                full = self._coalescer.join([call], time.monotonic())
            for group in full:
                self._send(group, call)
            while not call.ended:
                self._advance(call, waiter)
        except BaseException:
            self._leave(call)
            raise
        return call.take()

    def close(self) -> None:
        with self._lock:
            self._coalescer.close(ClientClosedError("the client was closed during the call"))

    def _advance(self, call: SharedCall, waiter: "_ThreadWaiter") -> None:
        """Send the call's group if it is this thread's turn, or wait until something happens."""
        left_s = call.deadline.remaining_s()
        with self._lock:
            send_s = call.sends_at_s - time.monotonic()
            group = call.group
        if group is not None and send_s <= 0:
            self._send(group, call)
        else:
            waiter.wait(send_s if left_s is None else min(left_s, send_s))

    def _send(self, group: CallGroup, call: SharedCall) -> None:
        with self._lock:
            if not self._coalescer.take(group):
                return
            self._under_way[group] = None
        try:
            if len(group.calls) == 1 and call in group.calls:
                self._embed_alone(group)
            else:
                self._start_embed(group)
        except BaseException:
            self._give_back(group)
            raise

    def _embed_alone(self, group: CallGroup) -> None:
        """Wait for the response in the one thread that needs it, which is cheaper than a future."""
        try:
            outcome: pb.EmbedResponse | Exception = self._transport.embed(group.request(), group.deadline)
        except Exception as error:
            outcome = error
        self._end(group, None, outcome)

    def _start_embed(self, group: CallGroup) -> None:
        try:
            pending = self._transport.start_embed(group.request(), group.deadline)
        except Exception as error:
            self._end(group, None, error)  # raised in the thread of each call
            return
        with self._lock:
            self._under_way[group] = pending
        pending.when_done(partial(self._receive, group, pending))
        if group.ended:  # every call left while the request was being started
            pending.cancel()

    def _receive(self, group: CallGroup, pending: PendingEmbed) -> None:
        """Take what came, in any thread."""
        try:
            outcome: pb.EmbedResponse | Exception = pending.result()
        except Exception as error:
            outcome = error
        self._end(group, pending, outcome)

    def _end(self, group: CallGroup, pending: PendingEmbed | None, outcome: pb.EmbedResponse | Exception) -> None:
        with self._lock:
            if self._under_way.get(group) is not pending:
                return  # of a request that was interrupted while it was started, and was sent again
            del self._under_way[group]
            for due in self._coalescer.end(group, outcome):
                due.calls[0].waiter.wake()

    def _give_back(self, group: CallGroup) -> None:
        """Let another thread send a group where an exception such as KeyboardInterrupt stopped this one."""
        with self._lock:
            if group not in self._under_way:
                return
            pending = self._under_way.pop(group)
            self._coalescer.give_back(group)
            if group.calls:
                group.calls[0].waiter.wake()
        if pending is not None:
            pending.cancel()

    def _leave(self, call: SharedCall) -> None:
        with self._lock:
            self._coalescer.leave(call)
            group = call.group
            if group is None:
                return
            pending = self._under_way.get(group) if group.ended else None
            if group.calls and not group.sent:
                group.calls[0].waiter.wake()  # it sends the group now
        if pending is not None:
            pending.cancel()


class _ThreadWaiter:
    """The wait of one thread, woken under the lock of its groups only."""

    __slots__ = ("_asleep",)

    def __init__(self) -> None:
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wake(self) -> None:
        """End the wait, or the next one where there is none."""
        if self._asleep.locked():
            self._asleep.release()

    def wait(self, timeout_s: float) -> None:
        """Wait for `wake`, so long at most."""
        self._asleep.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))
