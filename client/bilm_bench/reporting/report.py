"""A run as one dictionary, for JSON, the page and the summary."""

from datetime import timedelta
from typing import Any

from bilm_client._core.inputs import WholeSentence

from bilm_bench.conditions import flat
from bilm_bench.run import Measured
from bilm_bench.settings import BenchSettings
from bilm_bench.statistics.metrics import run_metrics, step_metrics
from bilm_bench.workload.texts import describe

FORMAT = 1
"""Changes when a metric is renamed or means something else."""

Report = dict[str, Any]


def make_report(settings: BenchSettings, sentences: list[WholeSentence], measured: Measured) -> Report:
    """Return the report of a run; docs/load.md lists the names."""
    figures = run_metrics(measured.total, measured.health, measured.samples, measured.cores, soak=bool(settings.soak))
    length_s = measured.samples[-1].at_s if measured.samples else 0.0
    return {
        "format": FORMAT,
        "begun": measured.begun.isoformat(timespec="seconds"),
        "ended": (measured.begun + timedelta(seconds=length_s)).isoformat(timespec="seconds"),
        "interrupted": measured.interrupted,
        "choices": settings.shown(),
        "text": describe(sentences),
        "model": {
            "name": measured.model.name,
            "version": measured.model.version,
            "backend": measured.model.backend,
            "precision": measured.model.precision,
            "server_version": measured.model.server_version,
        },
        "figures": figures,
        "steps": [{"load": step.load, **step_metrics(counters)} for step, counters in measured.steps],
        "samples": [sample.metrics() for sample in measured.samples],
        "conditions": _conditions(settings, figures),
    }


def is_violated(report: Report) -> bool:
    """Return whether any condition is violated."""
    return any(condition["violated"] for condition in report["conditions"])


def _conditions(settings: BenchSettings, figures: dict[str, Any]) -> list[dict[str, Any]]:
    values = dict(flat(figures))
    return [
        {"condition": str(condition), "value": value, "violated": condition.is_violated(value)}
        for condition in settings.conditions()
        for value in (values[condition.name],)
    ]
