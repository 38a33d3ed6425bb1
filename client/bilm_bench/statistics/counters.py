"""Counters of calls and health checks; nothing grows with their number."""

from collections import Counter
from dataclasses import dataclass, field

from bilm_bench.statistics.histogram import Histogram
from bilm_bench.workload.calls import CallKind, CallResult, Request
from bilm_bench.workload.probe import HealthCheck

_OVERDUE_S = 1.0


@dataclass(eq=False)
class Latencies:
    """Latencies of calls of one kind: since the moment they were meant for, and since they were sent."""

    meant: Histogram = field(default_factory=Histogram)
    sent: Histogram = field(default_factory=Histogram)

    def merge(self, other: "Latencies") -> None:
        """Add the counts of another one."""
        self.meant.merge(other.meant)
        self.sent.merge(other.sent)


@dataclass(eq=False)
class StepCounters:
    """Counters of the calls that were meant for one step.

    Attributes:
        length_s: Seconds of the step, so far as it went.
        calls: Calls that were meant to be sent.
        sentences: Sentences of those calls.
        tokens: Tokens of those sentences.
        sentences_in_time: Sentences whose call ended before the step did.
        tokens_in_time: Their tokens.
        latencies: Latencies by what became of the call.
        lateness: How late calls were sent.
        pushbacks: Pushbacks of refusals, those ≥ 0.
        never_retry: Refusals whose pushback says that retrying can't help.
        errors: Calls by status and reason, refusals among them.
        messages: The first message of each status and reason.
        sentence_errors: Sentences of accepted calls by the reason of their error.
        checked: Results of sentences that were compared with the expected ones.
        wrong: Results that differ.
        overdue: Calls that ended a second or more after their deadline, or never.
        not_sent: Calls that were due while too many were under way.
        unfinished: Calls that an interrupted run gave up.
    """

    length_s: float = 0.0
    calls: int = 0
    sentences: int = 0
    tokens: int = 0
    sentences_in_time: int = 0
    tokens_in_time: int = 0
    latencies: dict[CallKind, Latencies] = field(default_factory=lambda: {kind: Latencies() for kind in CallKind})
    lateness: Histogram = field(default_factory=Histogram)
    pushbacks: Histogram = field(default_factory=Histogram)
    never_retry: int = 0
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    messages: dict[tuple[str, str], str] = field(default_factory=dict)
    sentence_errors: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    wrong: int = 0
    overdue: int = 0
    not_sent: int = 0
    unfinished: int = 0

    def meant(self, request: Request) -> None:
        """Count a call that is due."""
        self.calls += 1
        self.sentences += len(request.indices)
        self.tokens += request.n_tokens

    def no_end(self) -> None:
        """Count a call that was given up long after its deadline."""
        self.overdue += 1
        self.errors["NO_END", ""] += 1

    def not_sendable(self) -> None:
        """Count a call that was due while too many were under way."""
        self.not_sent += 1
        self.errors["NOT_SENT", ""] += 1

    def ended(self, result: CallResult, since_meant_s: float, since_sent_s: float, timeout_s: float) -> None:
        """Count a call that has ended."""
        latencies = self.latencies[result.kind]
        latencies.meant.record(since_meant_s)
        latencies.sent.record(since_sent_s)
        self.overdue += since_sent_s > timeout_s + _OVERDUE_S
        self.checked += result.checked
        self.wrong += result.wrong
        self.sentence_errors.update(result.sentence_errors)
        if result.kind is CallKind.ACCEPTED:
            return
        self.errors[result.code, result.reason] += 1
        self.messages.setdefault((result.code, result.reason), result.message)
        if result.pushback_ms is not None and result.pushback_ms < 0:
            self.never_retry += 1
        elif result.pushback_ms is not None and result.kind is CallKind.REFUSED:
            self.pushbacks.record(result.pushback_ms / 1000)

    def in_time(self, result: CallResult) -> None:
        """Count a call that ended before its step did."""
        self.sentences_in_time += result.sentences
        self.tokens_in_time += result.tokens

    def merge(self, other: "StepCounters") -> None:
        """Add the counts of another one."""
        for name in (
            "length_s", "calls", "sentences", "tokens", "sentences_in_time", "tokens_in_time", "never_retry",
            "checked", "wrong", "overdue", "not_sent", "unfinished",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, latencies in other.latencies.items():
            self.latencies[kind].merge(latencies)
        self.lateness.merge(other.lateness)
        self.pushbacks.merge(other.pushbacks)
        self.errors.update(other.errors)
        self.messages = other.messages | self.messages
        self.sentence_errors.update(other.sentence_errors)


@dataclass(eq=False)
class SampleCounters:
    """Counters of what ended between two samples.

    Attributes:
        accepted: Latencies of accepted calls, since the moment they were meant for.
        refused: Refused calls.
        failed: Failed calls, those that were not sent among them.
        sentences: Sentences of accepted calls.
        tokens: Tokens of those sentences.
    """

    accepted: Histogram = field(default_factory=Histogram)
    refused: int = 0
    failed: int = 0
    sentences: int = 0
    tokens: int = 0

    def ended(self, result: CallResult, since_meant_s: float) -> None:
        """Count a call that has ended."""
        if result.kind is CallKind.ACCEPTED:
            self.accepted.record(since_meant_s)
        self.refused += result.kind is CallKind.REFUSED
        self.failed += result.kind is CallKind.FAILED
        self.sentences += result.sentences
        self.tokens += result.tokens


@dataclass(eq=False)
class HealthCounters:
    """Counters of the health checks.

    Attributes:
        latencies: Latencies of those with a response, since the moment they were meant for.
        statuses: Responses by status.
        errors: Checks without a response, by gRPC status.
    """

    latencies: Histogram = field(default_factory=Histogram)
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, check: HealthCheck) -> None:
        """Count a check that has ended."""
        if check.error:
            self.errors[check.error] += 1
        else:
            self.latencies.record(check.took_s)
            self.statuses[check.status] += 1
