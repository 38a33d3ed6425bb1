"""What a benchmark found: figures with their targets, on the screen and in a small JSON file."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bilm_system.files import write_text

from bilm_bench.reporting.numbers import short
from bilm_bench.statistics.rounds import Spread

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Figure:
    """One number that somebody may ask for.

    Attributes:
        key: what the page finds it by.
        what: the same in words.
        found: over the rounds.
        unit: of `found` and `target`.
        target: to be reached; None: reported only.
        at_least: whether the target is a lower bound.
    """

    key: str
    what: str
    found: Spread
    unit: str
    target: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        return self.found.median >= self.target if self.at_least else self.found.median <= self.target

    def line(self) -> str:
        """For the screen."""
        target = "" if self.target is None else f"{'≥' if self.at_least else '≤'} {self.target:g} {self.unit}"
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        spread = f"({short(self.found.minimum)} … {short(self.found.maximum)})"
        return f"{self.what:<74} {short(self.found.median):>9} {self.unit:<12} {spread:<22} {target:<16} {verdict}"

    def as_json(self) -> dict[str, Any]:
        """As the results file holds it."""
        found = {name: _rounded(value) for name, value in asdict(self.found).items()}
        return {**asdict(self), "found": found, "met": self.met}


@dataclass
class Report:
    """Collects what a benchmark finds, and prints it as it comes.

    Attributes:
        benchmark: its name, also that of the results file.
        settings: sizes, rounds and the like.
        figures: so far.
        details: measurements behind them, by section.
    """

    benchmark: str
    settings: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, *figures: Figure) -> None:
        """Figures of a section that is done."""
        for figure in figures:
            self.figures.append(figure)
            print(figure.line(), flush=True)

    def detail(self, section: str, found: Any) -> None:
        """What a section measured on the way."""
        self.details[section] = _rounded_throughout(found)

    def write(self, path: Path) -> None:
        """Writes the results."""
        content = {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "command": " ".join(["python", "-m", f"benchmarks.{self.benchmark}", *sys.argv[1:]]),
            "machine": machine(),
            "settings": self.settings,
            "figures": [figure.as_json() for figure in self.figures],
            "details": self.details,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", "backslashreplace")
        print(f"written to {path}")

    def summary(self) -> None:
        """Prints every figure once more, with its target."""
        print(f"\n{'':74} {'median':>9} {'unit':<12} {'(rounds)':<22} {'target':<16}")
        for figure in self.figures:
            print(figure.line())


def machine() -> dict[str, Any]:
    """Where this was measured, and what."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 - our own
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _rounded_throughout(found: Any) -> Any:
    if isinstance(found, float):
        return _rounded(found)
    if isinstance(found, dict):
        return {key: _rounded_throughout(value) for key, value in found.items()}
    return [_rounded_throughout(value) for value in found] if isinstance(found, list | tuple) else found
