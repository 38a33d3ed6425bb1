"""Threads that share one client and call with one sentence: sent together, against calls of many sentences."""

import sys
from contextlib import ExitStack
from functools import partial

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import ServerProcess

from benchmarks.experiments.in_process import Effort
from benchmarks.experiments.served import SERVER_ARGUMENTS
from benchmarks.load.pipe import PipedProcess

COALESCED_TARGET = 90.0
_THREADS, _MANY = 64, 32
_COALESCE_MS = 5.0
_WARM_S = 1.0
_LEAST_WINDOW_S = 6.0
"""64 calls of 32 sentences take two seconds together."""


def coalesced_calls(report: Findings, model: str, n_sentences: int, effort: Effort) -> None:
    """Measure one sentence a call coalesced, one a call as it is, and 32 a call, in turns.

    Threads with 32 a call are as many, and so few that as many sentences are under way.
    """
    with ServerProcess(model, SERVER_ARGUMENTS) as server, ExitStack() as stack:
        flags = ["--target", server.target, "--sentences", str(n_sentences)]
        command = [sys.executable, "-m", "benchmarks.load.thread_callers", *flags]
        coalescing = stack.enter_context(PipedProcess([*command, "--coalesce-ms", str(_COALESCE_MS)], {}))
        plain = stack.enter_context(PipedProcess(command, {}))
        window_s = max(effort.window_s, _LEAST_WINDOW_S)
        contestants: dict[str, Contestant] = {
            "coalesced": partial(_tokens_per_s, coalescing, _THREADS, 1, window_s),
            "one a call": partial(_tokens_per_s, plain, _THREADS, 1, window_s),
            "many a call": partial(_tokens_per_s, plain, _THREADS, _MANY, window_s),
            "as many under way": partial(_tokens_per_s, plain, _THREADS // _MANY, _MANY, window_s),
        }
        interleave(contestants, 1)
        found = interleave(contestants, effort.rounds)
    report.detail("coalescing", found)
    what = f"{_THREADS} threads of one client"
    few = f"{_THREADS // _MANY} threads, {_MANY} a call: as many sentences under way"
    share, of_few = (ratio(found["coalesced"], found[name]).times(100) for name in ("many a call", "as many under way"))
    report.add(
        Finding("coalescing/one", f"{what}, one sentence a call", Spread.of(found["one a call"]), "tokens/s"),
        Finding("coalescing/many", f"  {_MANY} a call", Spread.of(found["many a call"]), "tokens/s"),
        Finding("coalescing/few", f"  {few}", Spread.of(found["as many under way"]), "tokens/s"),
        Finding("coalescing/coalesced", "  one a call, coalesced", Spread.of(found["coalesced"]), "tokens/s"),
        Finding("coalescing", f"  coalesced against {_MANY} a call", share, "%", COALESCED_TARGET),
        Finding("coalescing/of_few", "  coalesced against as many under way", of_few, "%"),
    )


def _tokens_per_s(process: PipedProcess, threads: int, per_call: int, window_s: float) -> float:
    answer = process.ask("closed", threads=threads, per_call=per_call, warm_s=_WARM_S, seconds=window_s)
    return float(answer["tokens"] / answer["seconds"])
