"""Which `embed` calls of a client share a request, when it is sent, and what each call gets back. Without I/O.

Model, version, token and metadata are a client's, so its calls share them anyway; calls differ in their options,
sentences and deadlines. Nothing here waits or locks: a driver does, and brings the time.
"""

import copy
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.job import EmbedJob
from bilm_client._core.options import Options
from bilm_client._core.plan import NO_COST, RequestCost, total_of
from bilm_client._core.settings import Deadline
from bilm_client.errors import (
    BilmError,
    InvalidRequestError,
    MalformedResponseError,
    OverloadedError,
    ResourceExhaustedError,
)

# Requests of one kind that are under way at once where many calls are made.
_GROUPS_UNDER_WAY = 8


@dataclass(frozen=True, slots=True)
class SharedResults:
    """A call's part of a response.

    Attributes:
        results: One for each of its sentences.
        model_version: The version of the model that made them.
    """

    results: Sequence[pb.EmbedResult]
    model_version: str


class Waiter(Protocol):
    """How the caller of one `embed` is woken."""

    def wake(self) -> None: ...


@dataclass(slots=True, eq=False)
class SharedCall:
    """One `embed` that shares its request.

    Attributes:
        job: Its sentences, all of which travel in one part.
        deadline: Its own deadline.
        waiter: Woken when the call has ended.
        group: The calls that it shares a request with; None before it has joined.
        ended: Whether nothing more comes.
        outcome: What it has ended with: results, an error, or None: it is to be sent by itself.
    """

    job: EmbedJob
    deadline: Deadline
    waiter: Waiter
    group: "CallGroup | None" = None
    ended: bool = False
    outcome: SharedResults | Exception | None = None

    @property
    def sends_at_s(self) -> float:
        """When this call's driver is to send the group; `math.inf`: another call's does, or it was sent."""
        group = self.group
        if group is None or group.sent or group.calls[0] is not self:
            return math.inf
        return group.due_s

    def end(self, outcome: SharedResults | Exception | None) -> None:
        """Settle the call, unless it has ended, and wake its driver."""
        if not self.ended:
            self.outcome, self.ended = outcome, True
            self.waiter.wake()

    def take(self) -> SharedResults | None:
        """Return its part of the response; None: the call is to be sent by itself.

        Raises:
            BilmError: The shared request failed. It is a copy: exceptions that are raised in several threads at once
                would share their tracebacks.
        """
        if isinstance(self.outcome, BilmError):
            raise copy.copy(self.outcome) from self.outcome
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass(slots=True, eq=False)
class CallGroup:
    """Calls that share a request.

    Attributes:
        key: What all of them have in common.
        limit: What they may take together.
        due_s: When the request is to be sent, on the monotonic clock.
        cost: What they take together.
        calls: In the order of their sentences.
        sent: Whether the request was sent, or is being sent.
    """

    key: Hashable
    limit: RequestCost
    due_s: float
    cost: RequestCost = NO_COST
    calls: list[SharedCall] = field(default_factory=list)
    sent: bool = False

    @property
    def deadline(self) -> Deadline:
        """The latest deadline of its calls, which the request carries."""
        return Deadline(max(call.deadline.at_s for call in self.calls))

    @property
    def ended(self) -> bool:
        """Whether no call waits for the request any more."""
        return all(call.ended for call in self.calls)

    def request(self) -> pb.EmbedRequest:
        """Return the message for all sentences."""
        return self.calls[0].job.message([source for call in self.calls for source in call.job.inputs])


class Coalescer:
    """Gathers calls into groups.

    Calls with equal options form a group, which is due after `wait_s`, or before that when it is full: when it has an
    eighth of the sentences that are under way or gathering, or what a request may have. So up to eight calls at a time
    go by themselves and wait for nothing, and more calls make larger groups. Groups that only `wait_s` bounds merge
    until few are left: a response wakes all its callers, whose next calls gather again. Then most sentences wait for
    the longest one of many, and the server computes fewer at once.

    Args:
        wait_s: The longest wait of a call for others.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._gathering: dict[Hashable, CallGroup] = {}
        self._sentences: Counter[Hashable] = Counter()  # under way or gathering

    def join(self, calls: Sequence[SharedCall], now_s: float) -> list[CallGroup]:
        """Let calls that were made at the same time join groups; return the groups that are full now."""
        keys = [sharing_key(call.job.options) for call in calls]
        for key, call in zip(keys, calls, strict=True):
            self._sentences[key] += call.job.cost.sentences
        return [full for key, call in zip(keys, calls, strict=True) for full in self._join(key, call, now_s)]

    def take(self, group: CallGroup) -> bool:
        """Take a group to send it; False: it was sent already, or has no calls any more."""
        if group.sent or not group.calls:
            return False
        self._close(group).sent = True
        return True

    def give_back(self, group: CallGroup) -> None:
        """Take a group back whose sending was interrupted: it is due again, less the calls that have left meanwhile."""
        group.sent = False
        for call in [call for call in group.calls if call.ended]:
            self._remove(call, group)

    def leave(self, call: SharedCall) -> None:
        """Remove a call that waits no longer; where it was sent already, its results are dropped."""
        if call.ended:
            return
        call.ended, group = True, call.group
        if group is not None and not group.sent:
            self._remove(call, group)

    def end(self, group: CallGroup, outcome: pb.EmbedResponse | Exception) -> list[CallGroup]:
        """Settle the calls of a group by what came of its request; return the groups that are full now."""
        self._forget(group.key, group.cost.sentences)
        _settle(group, outcome)
        gathering = self._gathering.get(group.key)
        if gathering is None or not self._is_full(gathering):
            return []
        gathering.due_s = -math.inf  # until it is taken, others may still join
        return [gathering]

    def close(self, error: BilmError) -> None:
        """End the calls that weren't sent with an error."""
        for group in list(self._gathering.values()):
            self._close(group).sent = True
            self._forget(group.key, group.cost.sentences)
            for call in group.calls:
                call.end(error)

    def _join(self, key: Hashable, call: SharedCall, now_s: float) -> list[CallGroup]:
        cost, full = call.job.cost, []
        group = self._gathering.get(key)
        if group is not None and not (group.cost + cost).fits(group.limit):
            full.append(self._close(group))
            group = None
        if group is None:
            group = self._gathering[key] = CallGroup(key, call.job.shared_limit, now_s + self._wait_s)
        group.cost += cost
        group.calls.append(call)
        call.group = group
        if self._is_full(group):
            full.append(self._close(group))
        return full

    def _is_full(self, group: CallGroup) -> bool:
        enough = min(group.limit.sentences, self._sentences[group.key] / _GROUPS_UNDER_WAY)
        return group.cost.sentences >= enough or group.cost.tokens == group.limit.tokens

    def _close(self, group: CallGroup) -> CallGroup:
        """Let no further call join."""
        if self._gathering.get(group.key) is group:
            del self._gathering[group.key]
        group.due_s = -math.inf
        return group

    def _remove(self, call: SharedCall, group: CallGroup) -> None:
        group.calls.remove(call)
        group.cost = total_of([other.job.cost for other in group.calls])
        self._forget(group.key, call.job.cost.sentences)
        if not group.calls:
            self._close(group)

    def _forget(self, key: Hashable, sentences: int) -> None:
        self._sentences[key] -= sentences
        if not self._sentences[key]:
            del self._sentences[key]


def may_share(job: EmbedJob, deadline: Deadline, until_s: float) -> bool:
    """Return whether a job may share its request: it is small, has no states, and has time until after `until_s`."""
    return (
        job.cost.fits(job.shared_limit)
        and deadline.at_s > until_s
        and not any(source.state or source.return_state for source in job.inputs)
    )


def sharing_key(options: Options) -> Hashable:
    """Return what calls must have in common to share a request: the options that a request states once."""
    return options.layers, options.pool, options.dtype, options.mix, options.l2_normalize, options.priority


def _settle(group: CallGroup, outcome: pb.EmbedResponse | Exception) -> None:
    if isinstance(outcome, Exception):
        _end_all(group, None if len(group.calls) > 1 and _may_concern_one(outcome) else outcome)
        return
    expected, found = group.cost.sentences, len(outcome.results)
    if expected != found:
        _end_all(group, MalformedResponseError(f"expected {expected} results, got {found}"))
        return
    first = 0
    for call in group.calls:
        after = first + call.job.cost.sentences
        call.end(SharedResults(outcome.results[first:after], outcome.usage.model_version))
        first = after


def _end_all(group: CallGroup, outcome: Exception | None) -> None:
    for call in group.calls:
        call.end(outcome)


def _may_concern_one(error: Exception) -> bool:
    """Return whether an error may be due to one call's sentences or to their number; one that passes is not."""
    if isinstance(error, ResourceExhaustedError):
        return not isinstance(error, OverloadedError)
    return isinstance(error, InvalidRequestError)
