"""A run as one dictionary, for JSON, the page and the summary."""

from datetime import timedelta
from typing import Any

from bilm_client._core.inputs import Sentence

from bilm_bench.conditions import flat
from bilm_bench.run import Measured
from bilm_bench.settings import BenchSettings
from bilm_bench.statistics.metrics import run_figures, tally_figures
from bilm_bench.workload.texts import describe

FORMAT = 1
"""Changes when a figure is renamed or means something else."""

Report = dict[str, Any]


def make_report(settings: BenchSettings, sentences: list[Sentence], measured: Measured) -> Report:
    """All that is to be said of a run; docs/load.md lists the names."""
    figures = run_figures(measured.total, measured.health, measured.samples, measured.cores, soak=bool(settings.soak))
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
        "steps": [{"load": step.load, **tally_figures(tally)} for step, tally in measured.steps],
        "samples": [sample.figures() for sample in measured.samples],
        "conditions": _conditions(settings, figures),
    }


def is_violated(report: Report) -> bool:
    """Whether any condition is."""
    return any(condition["violated"] for condition in report["conditions"])


def _conditions(settings: BenchSettings, figures: dict[str, Any]) -> list[dict[str, Any]]:
    values = dict(flat(figures))
    return [
        {"condition": str(condition), "value": value, "violated": condition.is_violated(value)}
        for condition in settings.conditions()
        for value in (values[condition.name],)
    ]
