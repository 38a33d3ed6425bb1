"""Callers of a server that each wait for their response, and what the server's threads spend on a call."""

from dataclasses import dataclass, field
from typing import Any

from bilm_client.testing.server import RunningServer

from benchmarks.load.load import LoadGenerator
from benchmarks.process_usage import spent_s, thread_cpu_s


@dataclass
class ClosedLoad:
    """Callers of one server, and what was found in each round.

    Attributes:
        server: That they call.
        generator: Their process.
        callers: So many, each with one call under way.
        per_call: Sentences of a call.
        warm_s: Until as much ends as begins.
        window_s: That counts.
        answers: Of the generator, one a round.
        profiles: Seconds of processor time by thread of the server, one a round.
    """

    server: RunningServer
    generator: LoadGenerator
    callers: int
    per_call: int
    warm_s: float
    window_s: float
    answers: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, float]] = field(default_factory=list)

    def tokens_per_s(self) -> float:
        """Return the throughput of a round."""
        before = thread_cpu_s(self.server.process_id)
        answer = self.generator.closed(self.callers, self.per_call, self.warm_s, self.window_s)
        self.profiles.append(spent_s(before, thread_cpu_s(self.server.process_id)))
        self.answers.append(answer)
        return float(answer["tokens"] / answer["seconds"])

    def forget(self) -> None:
        """Forget the rounds so far."""
        self.answers.clear()
        self.profiles.clear()

    def cpu_ms_per_call(self, thread: str | None = None) -> list[float]:
        """Return the processor time of a thread of the server, or of all, in each round."""
        return [
            1e3 * (sum(profile.values()) if thread is None else profile[thread]) / answer["calls_in_all"]
            for profile, answer in zip(self.profiles, self.answers, strict=True)
        ]

    def tokens_per_call(self) -> list[float]:
        """Return the mean tokens of a call, in each round."""
        return [answer["tokens"] / answer["calls"] for answer in self.answers]

    def generator_ms_per_call(self) -> list[float]:
        """Return the generator's processor time for a call, in each round."""
        return [answer["generator_cpu_ms_per_call"] for answer in self.answers]
