"""Reports of experiments with torch: which one runs, and on what."""

from typing import Any

import torch
from bilm_bench.reporting.experiment import Findings


def new_report(name: str, module: str, settings: dict[str, Any]) -> Findings:
    """Return the report of an experiment that is run as `python -m module`."""
    libraries = {"capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    return Findings(name, module, settings, libraries)
