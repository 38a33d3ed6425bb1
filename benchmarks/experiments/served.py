"""The service against the engine without it, and against a bare grpc.aio handler with messages of the same sizes."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import grpc
import torch
from bilm_api.v1 import embed_pb2
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import RunningServer, ServerProcess
from bilm_model.engine.types import DataType
from bilm_model.scalar_mix import Pooling

from benchmarks.experiments.in_process import Effort
from benchmarks.load.bilm_caller import new_request
from benchmarks.load.callers_load import ClosedLoad
from benchmarks.load.engine_process import EngineProcess
from benchmarks.load.load import LoadGenerator
from benchmarks.process_usage import EVENT_LOOP
from benchmarks.references.bare_server import BareServer

CALLERS = 64
SERVER_ARGUMENTS = ("--log-level", "warning", "--max-waiting-tokens", "131072")
LOOP_CALLERS = 16
LOOP_TARGETS = {1: 2.0, 32: 4.0}
"""Sentences a call -> event loop's processor time a call, in times of a bare handler's."""

_METHOD = f"/{embed_pb2.DESCRIPTOR.services_by_name['EmbedService'].full_name}/Embed"
_THREADS_SHOWN = 5


@dataclass(frozen=True)
class ServedCase:
    """One way to call.

    Attributes:
        size: of the model.
        pool: over the tokens.
        dtype: of the response.
        per_call: sentences.
        target: per cent of the tokens/s in process, or of what is left of them; None: reported.
        warm_s: until as much ends as begins.
        of_what_is_left: whether the target is a share of what a bare handler and the callers leave of the cores.
    """

    size: str
    pool: Pooling
    dtype: DataType
    per_call: int
    target: float | None
    warm_s: float
    of_what_is_left: bool = False

    @property
    def key(self) -> str:
        """For the page."""
        return f"{self.size}/{'pooled' if self.pool == 'mean' else 'all'}/{self.dtype}/{self.per_call}"

    def __str__(self) -> str:
        what = "mean-pooled" if self.pool == "mean" else "all layers"
        return f"{self.size} float32, {CALLERS} callers, {self.per_call} a call, {what} {self.dtype}"


ORIGINAL_CASES = (
    ServedCase("original", "mean", "float32", 1, 92.0, 2.5),
    ServedCase("original", "none", "float16", 1, 85.0, 2.5),
)
CASES = (
    ServedCase("small", "mean", "float32", 1, 90.0, 1.0, of_what_is_left=True),
    ServedCase("small", "mean", "float32", 32, 95.0, 6.0),
)


def served_throughput(
    report: Findings, sentences: Sequence[Sequence[str]], effort: Effort, cases: Sequence[ServedCase] = CASES
) -> None:
    """Measure each case through a server and in process, in turns."""
    for size in dict.fromkeys(case.size for case in cases):
        with ServerProcess(f"random:{size}", SERVER_ARGUMENTS) as server, ExitStack() as stack:
            comparisons = [_Comparison(server, case, sentences, effort, stack) for case in cases if case.size == size]
            contestants = {name: run for one in comparisons for name, run in one.contestants().items()}
            interleave(contestants, 1)  # every word is known, every kernel compiled
            for one in comparisons:
                one.forget()
            found = interleave(contestants, effort.rounds)
            for one in comparisons:
                one.report(report, found)


def event_loop_time(report: Findings, model: str, sentences: Sequence[Sequence[str]], effort: Effort) -> None:
    """Measure the processor time that a call takes on the event loop, against a bare handler's."""
    with ServerProcess(model, SERVER_ARGUMENTS) as server:
        for per_call, target in LOOP_TARGETS.items():
            with ExitStack() as stack:
                loads = {
                    name: _closed_load(target_server, len(sentences), per_call, effort, stack)
                    for name, target_server in (
                        ("served", server),
                        ("bare", stack.enter_context(BareServer(response_of(server, sentences, per_call)))),
                    )
                }
                contestants: dict[str, Contestant] = {name: load.tokens_per_s for name, load in loads.items()}
                interleave(contestants, 1)
                for load in loads.values():
                    load.forget()
                interleave(contestants, effort.rounds)
            served, bare = (loads[name].cpu_ms_per_call(EVENT_LOOP) for name in ("served", "bare"))
            report.detail(f"event loop {per_call}", {"served_ms_per_call": served, "bare_ms_per_call": bare})
            what = f"event loop, {LOOP_CALLERS} callers, {per_call} a call: processor time"
            report.add(
                Finding(f"event_loop/{per_call}/served", what, Spread.of(served), "ms/call"),
                Finding(f"event_loop/{per_call}/bare", "  a bare grpc.aio handler's", Spread.of(bare), "ms/call"),
                Finding(f"event_loop/{per_call}", "  in times of it", ratio(served, bare), "×", target, at_least=False),
            )


def response_of(
    server: RunningServer, sentences: Sequence[Sequence[str]], per_call: int, pool: Pooling = "mean"
) -> bytes:
    """Return a server's response to a call of so many sentences, as it is on the wire."""
    request = new_request(sentences[:per_call], "all", pool, "float32").SerializeToString()
    with grpc.insecure_channel(server.target) as channel:
        call: Callable[..., bytes] = channel.unary_unary(_METHOD)
        return call(request, timeout=60.0)


def _closed_load(
    server: RunningServer, n_sentences: int, per_call: int, effort: Effort, stack: ExitStack
) -> ClosedLoad:
    generator = stack.enter_context(LoadGenerator(server.target, n_sentences))
    return ClosedLoad(server, generator, LOOP_CALLERS, per_call, effort.window_s / 2, effort.window_s)


class _Comparison:
    """A case: through the server, in process and, where what they leave is asked for, through a bare handler.

    Args:
        server: of the case's size.
        case: what to measure.
        sentences: to embed.
        effort: how long to measure.
        stack: ends the processes.
    """

    def __init__(
        self,
        server: RunningServer,
        case: ServedCase,
        sentences: Sequence[Sequence[str]],
        effort: Effort,
        stack: ExitStack,
    ) -> None:
        self._case, self._effort, n = case, effort, len(sentences)

        def load(target: RunningServer) -> ClosedLoad:
            generator = stack.enter_context(LoadGenerator(target.target, n, pool=case.pool, dtype=case.dtype))
            return ClosedLoad(target, generator, CALLERS, case.per_call, case.warm_s, effort.window_s)

        self._served = load(server)
        self._bare: ClosedLoad | None = None
        if case.of_what_is_left:
            response = response_of(server, sentences, case.per_call, case.pool)
            self._bare = load(stack.enter_context(BareServer(response)))
        in_flight = CALLERS * case.per_call  # the engine takes as many of them as it does in a server
        engine = EngineProcess(
            n, model=f"random:{case.size}", in_flight=in_flight, layers="all", pool=case.pool, dtype=case.dtype
        )
        self._engine = stack.enter_context(engine)

    def contestants(self) -> dict[str, Contestant]:
        """Return what to measure in turns."""
        found: dict[str, Contestant] = {
            f"{self._case} served": self._served.tokens_per_s,
            f"{self._case} in process": lambda: self._engine.tokens_per_s(self._effort.window_s),
        }
        if self._bare is not None:
            found[f"{self._case} bare"] = self._bare.tokens_per_s
        return found

    def forget(self) -> None:
        """Forget the rounds so far."""
        for load in (self._served, self._bare):
            if load is not None:
                load.forget()

    def report(self, report: Findings, found: dict[str, list[float]]) -> None:
        """Report the case."""
        case, served = self._case, self._served
        rates, in_process = found[f"{case} served"], found[f"{case} in process"]
        loop_ms = served.cpu_ms_per_call(EVENT_LOOP)
        busiest = sorted(served.profiles[-1].items(), key=lambda item: -item[1])[:_THREADS_SHOWN]
        report.detail(
            f"served {case.key}",
            {
                "served_tokens_per_s": rates,
                "in_process_tokens_per_s": in_process,
                "generator_cores": [answer["generator_cores"] for answer in served.answers],
                "cpu_s_by_thread_of_the_last_round": dict(busiest),
                "cpu_ms_per_call_of_all_threads": served.cpu_ms_per_call(),
                "cpu_ms_per_call_of_the_event_loop": loop_ms,
            },
        )
        target = None if case.of_what_is_left else case.target
        share = ratio(rates, in_process).times(100)
        report.add(
            Finding(f"served/{case.key}", f"{case}", Spread.of(rates), "tokens/s"),
            Finding(f"served/{case.key}/share", "  against in process", share, "%", target),
            Finding(f"served/{case.key}/cpu", "  event loop's processor time", Spread.of(loop_ms), "ms/call"),
        )
        if self._bare is not None:
            self._report_what_is_left(report, self._bare, rates, in_process)

    def _report_what_is_left(
        self, report: Findings, bare: ClosedLoad, rates: list[float], in_process: list[float]
    ) -> None:
        """Compare with an engine that has the cores save what the callers of the same run and a bare handler take.

        At X calls a second of t tokens, g ms of the generator and b ms of the bare handler a call, N·(1 - X·(g + b)/N)
        cores are left, with which the engine's T tokens/s in process become T·(1 - X·(g + b)/N) = X·t.
        """
        cores, bare_ms = torch.get_num_threads(), bare.cpu_ms_per_call()
        limits = [
            1 / (1 / tokens_per_s + 1e-3 * (generator_ms + handler_ms) / (cores * per_call))
            for tokens_per_s, generator_ms, handler_ms, per_call in zip(
                in_process, self._served.generator_ms_per_call(), bare_ms, self._served.tokens_per_call(), strict=True
            )
        ]
        key = f"served/{self._case.key}/left"
        left = ratio(rates, limits).times(100)
        report.add(
            Finding(f"{key}/bare", "  a bare handler's processor time, all threads", Spread.of(bare_ms), "ms/call"),
            Finding(f"{key}/limit", "  what bare handler and callers leave", Spread.of(limits), "tokens/s"),
            Finding(key, "  against that", left, "%", self._case.target),
        )
