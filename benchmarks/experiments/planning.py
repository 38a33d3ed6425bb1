"""Joining, planning and collecting without computing: an engine on one core whose back end computes nothing."""

from contextlib import ExitStack
from typing import Any

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave

from benchmarks.experiments.in_process import Effort
from benchmarks.load.engine_process import EngineProcess

STEPS_PER_S_TARGET = 3e6
JOIN_US_TARGET = 9.0
_SENTENCES = 4000
_ROWS = (128, 1024)


def planning(report: Findings, effort: Effort, sentences: int = _SENTENCES) -> None:
    """Measure, by the thread's processor time, from `join` to pooled top results; all words are known."""
    with ExitStack() as stack:
        found: dict[int, list[dict[str, Any]]] = {rows: [] for rows in _ROWS}
        contestants: dict[str, Contestant] = {}
        for rows in _ROWS:
            engine = stack.enter_context(EngineProcess(sentences, rows=rows, one_core=True, idle=True))

            def measure(engine: EngineProcess = engine, rows: int = rows) -> float:
                found[rows].append(engine.full(effort.window_s))
                return float(found[rows][-1]["steps_per_cpu_s"])

            contestants[str(rows)] = measure
        interleave(contestants, 1)
        for works in found.values():
            works.clear()
        interleave(contestants, effort.rounds)
    report.detail("planning", {str(rows): works for rows, works in found.items()})
    for rows, works in found.items():
        rates, join_us = ([work[name] for work in works] for name in ("steps_per_cpu_s", "join_us"))
        what = f"back end that computes nothing, {rows} rows, one core"
        report.add(
            Finding(f"planning/{rows}/steps", f"{what}", Spread.of(rates), "steps/s", STEPS_PER_S_TARGET),
            Finding(f"planning/{rows}/join", "  to join", Spread.of(join_us), "µs/sentence", JOIN_US_TARGET, False),
        )
