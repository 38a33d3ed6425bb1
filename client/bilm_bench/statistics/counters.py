"""What became of the calls, counted; nothing grows with their number."""

from collections import Counter
from dataclasses import dataclass, field

from bilm_bench.statistics.histogram import Histogram
from bilm_bench.workload.calls import Answer, Kind, Request

_OVERDUE_S = 1.0


@dataclass(eq=False)
class Latencies:
    """Of calls of one kind: since the moment they were meant for, and since they were sent."""

    meant: Histogram = field(default_factory=Histogram)
    sent: Histogram = field(default_factory=Histogram)

    def merge(self, other: "Latencies") -> None:
        """Counts all that another one has."""
        self.meant.merge(other.meant)
        self.sent.merge(other.sent)


@dataclass(eq=False)
class Tally:
    """Calls that were meant for one step.

    Attributes:
        length_s: of the step, so far as it went.
        calls: that were meant to be sent.
        sentences: of those calls.
        tokens: of those sentences.
        sentences_in_time: answered while the step went on.
        tokens_in_time: likewise.
        latencies: by what became of the call.
        lateness: of sending, against the plan: the generator's own.
        pushbacks: that came with refusals, those ≥ 0.
        never_retry: refusals that said that retrying can't help.
        errors: calls by status and reason, refusals among them.
        messages: the first one of each status and reason.
        sentence_errors: sentences of accepted calls by the reason of their error.
        checked: answers (of sentences) compared with the known ones.
        wrong: of them, those that differ.
        overdue: calls that ended a second or more after their deadline, or never.
        not_sent: calls that were due while too many were under way.
        unfinished: calls that an interrupted run gave up.
    """

    length_s: float = 0.0
    calls: int = 0
    sentences: int = 0
    tokens: int = 0
    sentences_in_time: int = 0
    tokens_in_time: int = 0
    latencies: dict[Kind, Latencies] = field(default_factory=lambda: {kind: Latencies() for kind in Kind})
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
        """A call is due."""
        self.calls += 1
        self.sentences += len(request.indices)
        self.tokens += request.n_tokens

    def no_end(self) -> None:
        """A call was given up long after its deadline."""
        self.overdue += 1
        self.errors["NO_END", ""] += 1

    def not_sendable(self) -> None:
        """A call was due while too many were under way."""
        self.not_sent += 1
        self.errors["NOT_SENT", ""] += 1

    def ended(self, answer: Answer, since_meant_s: float, since_sent_s: float, timeout_s: float) -> None:
        """A call came to its end."""
        latencies = self.latencies[answer.kind]
        latencies.meant.record(since_meant_s)
        latencies.sent.record(since_sent_s)
        self.overdue += since_sent_s > timeout_s + _OVERDUE_S
        self.checked += answer.checked
        self.wrong += answer.wrong
        self.sentence_errors.update(answer.sentence_errors)
        if answer.kind is Kind.ACCEPTED:
            return
        self.errors[answer.code, answer.reason] += 1
        self.messages.setdefault((answer.code, answer.reason), answer.message)
        if answer.pushback_ms is not None and answer.pushback_ms < 0:
            self.never_retry += 1
        elif answer.pushback_ms is not None and answer.kind is Kind.REFUSED:
            self.pushbacks.record(answer.pushback_ms / 1000)

    def in_time(self, answer: Answer) -> None:
        """That call ended while its step went on."""
        self.sentences_in_time += answer.sentences
        self.tokens_in_time += answer.tokens

    def merge(self, other: "Tally") -> None:
        """Counts all that another one has."""
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
class Window:
    """What ended between two samples.

    Attributes:
        accepted: latencies of accepted calls, since the moment they were meant for.
        refused: calls.
        failed: calls, those that were not sent among them.
        sentences: answered.
        tokens: of those.
    """

    accepted: Histogram = field(default_factory=Histogram)
    refused: int = 0
    failed: int = 0
    sentences: int = 0
    tokens: int = 0

    def ended(self, answer: Answer, since_meant_s: float) -> None:
        """A call came to its end."""
        if answer.kind is Kind.ACCEPTED:
            self.accepted.record(since_meant_s)
        self.refused += answer.kind is Kind.REFUSED
        self.failed += answer.kind is Kind.FAILED
        self.sentences += answer.sentences
        self.tokens += answer.tokens
