"""The service against the engine without it: throughput, and the service's processor time a call."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import RunningServer, ServerProcess
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import EmbeddedSentence
from bilm_model.scalar_mix import Pooling, Selection

from benchmarks.experiments.in_process import Effort
from benchmarks.load.load import LoadGenerator
from benchmarks.load.steady import SteadyLoad, new_engine, show_all_words

CALLERS = 64
SERVER_ARGUMENTS = ("--log-level", "warning", "--max-waiting-tokens", "131072")
EVENT_LOOP = "event loop"
_MAX_ROWS = 128  # the server's and the engine's default
_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_THREADS_SHOWN = 5


@dataclass(frozen=True)
class ServedCase:
    """One way to call.

    Attributes:
        size: of the model.
        pool: over the tokens.
        dtype: of the answer.
        per_call: sentences.
        target: per cent of the tokens/s in process; None: reported.
        warm_s: until as much ends as begins.
    """

    size: str
    pool: Pooling
    dtype: str
    per_call: int
    target: float | None
    warm_s: float

    @property
    def key(self) -> str:
        """For the page."""
        return f"{self.size}/{'pooled' if self.pool == 'mean' else 'all'}/{self.dtype}/{self.per_call}"

    def __str__(self) -> str:
        what = "mean-pooled" if self.pool == "mean" else "all layers"
        return f"{self.size} float32, {CALLERS} callers, {self.per_call} a call, {what} {self.dtype}"


CASES = (
    ServedCase("original", "mean", "float32", 1, 92.0, 2.5),
    ServedCase("original", "none", "float16", 1, 85.0, 2.5),
    ServedCase("small", "mean", "float32", 1, None, 1.0),
    ServedCase("small", "mean", "float32", 32, 85.0, 6.0),
)


def served_throughput(
    report: Findings, sentences: Sequence[Sequence[str]], effort: Effort, cases: Sequence[ServedCase] = CASES
) -> None:
    """Measure each case through a server and in process, in turns."""
    for size in dict.fromkeys(case.size for case in cases):
        with ServerProcess(f"random:{size}", SERVER_ARGUMENTS) as server:
            _compare(report, server, [case for case in cases if case.size == size], sentences, effort)


def _compare(
    report: Findings,
    server: RunningServer,
    cases: list[ServedCase],
    sentences: Sequence[Sequence[str]],
    effort: Effort,
) -> None:
    with ExitStack() as stack:
        served: list[_Served] = []
        contestants: dict[str, Contestant] = {}
        for case in cases:
            generator = LoadGenerator(server.target, len(sentences), pool=case.pool, dtype=case.dtype)
            served.append(_Served(stack.enter_context(generator), server.process_id, case, effort))
            contestants[f"{case} served"] = served[-1].tokens_per_s
            contestants[f"{case} in process"] = _in_process(case, sentences, effort)
        interleave(contestants, 1)  # every word is known, every kernel compiled
        for one in served:
            one.forget()
        found = interleave(contestants, effort.rounds)
    for one in served:
        _report(report, one, found[f"{one.case} served"], found[f"{one.case} in process"])


def _in_process(case: ServedCase, sentences: Sequence[Sequence[str]], effort: Effort) -> Contestant:
    """Return the throughput of the same engine with as many sentences in flight, the same selection and format."""
    engine = new_engine(case.size, EngineOptions())
    show_all_words(engine, sentences)
    load = SteadyLoad(engine, sentences, min(_MAX_ROWS, CALLERS * case.per_call), finish(case.pool, case.dtype))
    load.measure(effort.window_s / 4)
    return lambda: load.measure(effort.window_s).tokens_per_s


def finish(pool: Pooling, dtype: str) -> Callable[[EmbeddedSentence], bytes]:
    """Return what the server makes of a sentence, up to the bytes."""
    selection, torch_dtype = Selection("all", pool), getattr(torch, dtype)
    return lambda embedded: selection(embedded.layers).to(torch_dtype).contiguous().numpy().tobytes()


@dataclass
class _Served:
    """A case's generator and server, and what they said of each round."""

    generator: LoadGenerator
    process_id: int
    case: ServedCase
    effort: Effort
    answers: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, float]] = field(default_factory=list)

    def tokens_per_s(self) -> float:
        """Return the throughput of a round."""
        before = thread_cpu_s(self.process_id)
        answer = self.generator.closed(CALLERS, self.case.per_call, self.case.warm_s, self.effort.window_s)
        after = thread_cpu_s(self.process_id)
        self.profiles.append({thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()})
        self.answers.append(answer)
        return float(answer["tokens"] / answer["seconds"])

    def forget(self) -> None:
        """Forget the rounds so far."""
        self.answers.clear()
        self.profiles.clear()

    def cpu_ms_per_call(self, thread: str | None = None) -> list[float]:
        """Processor time of a thread, or of all, in each round."""
        return [
            1e3 * (sum(profile.values()) if thread is None else profile[thread]) / answer["calls_in_all"]
            for profile, answer in zip(self.profiles, self.answers, strict=True)
        ]


def _report(report: Findings, served: _Served, served_rates: list[float], in_process_rates: list[float]) -> None:
    case = served.case
    busiest = sorted(served.profiles[-1].items(), key=lambda item: -item[1])[:_THREADS_SHOWN]
    event_loop_ms = served.cpu_ms_per_call(EVENT_LOOP)
    report.detail(
        f"served {case.key}",
        {
            "served_tokens_per_s": served_rates,
            "in_process_tokens_per_s": in_process_rates,
            "generator_cores": [answer["generator_cores"] for answer in served.answers],
            "cpu_s_by_thread_of_the_last_round": dict(busiest),
            "cpu_ms_per_call_of_all_threads": served.cpu_ms_per_call(),
            "cpu_ms_per_call_of_the_event_loop": event_loop_ms,
        },
    )
    share = ratio(served_rates, in_process_rates).times(100)
    report.add(
        Finding(f"served/{case.key}", f"{case}", Spread.of(served_rates), "tokens/s"),
        Finding(f"served/{case.key}/share", "  against in process", share, "%", case.target),
        Finding(f"served/{case.key}/cpu", "  event loop's processor time", Spread.of(event_loop_ms), "ms/call"),
    )


def thread_cpu_s(process_id: int) -> dict[str, float]:
    """Return seconds of processor time of each thread of a process; the first thread runs the event loop."""
    found = {}
    for task in Path(f"/proc/{process_id}/task").iterdir():
        try:
            fields = (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        name = EVENT_LOOP if task.name == str(process_id) else f"thread {task.name}"
        found[name] = (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS_PER_S  # utime, stime
    return found
