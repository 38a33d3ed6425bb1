"""Other protocols against `Embed`, on one server: their callers take turns."""

from collections.abc import Sequence
from contextlib import ExitStack

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import ServerProcess

from benchmarks.experiments.in_process import Effort
from benchmarks.load.callers_load import ClosedLoad
from benchmarks.load.load import LoadGenerator

CALLERS, PER_CALL = 16, 32
TARGETS = {"kserve": 95.0}
"""Protocol -> per cent of the tokens/s of `Embed`."""

_WARM_S = 1.0
_EMBED = "bilm"


def other_protocols(report: Findings, model: str, sentences: Sequence[Sequence[str]], effort: Effort) -> None:
    """Measure calls of 32 mean-pooled sentences by each protocol."""
    with ServerProcess(model, ("--log-level", "warning")) as server, ExitStack() as stack:
        loads = {}
        for protocol in (_EMBED, *TARGETS):
            generator = stack.enter_context(LoadGenerator(server.target, len(sentences), protocol))
            loads[protocol] = ClosedLoad(server, generator, CALLERS, PER_CALL, _WARM_S, effort.window_s)
        contestants: dict[str, Contestant] = {name: load.tokens_per_s for name, load in loads.items()}
        interleave(contestants, 1)
        for load in loads.values():
            load.forget()
        found = interleave(contestants, effort.rounds)
    cpu_ms = {name: load.cpu_ms_per_call() for name, load in loads.items()}
    report.detail("doors", {"tokens_per_s": found, "cpu_ms_per_call_of_all_threads": cpu_ms})
    report.add(Finding("doors/embed", f"Embed, {PER_CALL} a call", Spread.of(found[_EMBED]), "tokens/s"))
    for name, target in TARGETS.items():
        share, cpu_share = ratio(found[name], found[_EMBED]), ratio(cpu_ms[_EMBED], cpu_ms[name])
        report.add(
            Finding(f"doors/{name}", f"{name}, {PER_CALL} a call", Spread.of(found[name]), "tokens/s"),
            Finding(f"doors/{name}/share", "  against Embed", share.times(100), "%", target),
            Finding(f"doors/{name}/cpu", "  calls a second of the processor, against Embed", cpu_share.times(100), "%"),
        )
