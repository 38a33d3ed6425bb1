"""What an experiment measures: numbers with their targets, on the screen and in a small JSON file."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bilm_system.files import write_text

from bilm_bench.reporting.numbers import short
from bilm_bench.statistics.rounds import Spread

_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Finding:
    """One number, measured in several rounds.

    Attributes:
        key: Name by which the page finds it.
        what: The same in words.
        found: Median, range and quartiles over the rounds.
        unit: Unit of `found` and `target`.
        target: To be reached; None: reported only.
        at_least: Whether the target is a lower bound.
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
        """Return the finding for the screen."""
        target = "" if self.target is None else f"{'≥' if self.at_least else '≤'} {self.target:g} {self.unit}"
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        spread = f"({short(self.found.lower_quartile)} … {short(self.found.upper_quartile)})"
        return f"{self.what:<74} {short(self.found.median):>9} {self.unit:<12} {spread:<22} {target:<16} {verdict}"

    def as_json(self) -> dict[str, Any]:
        """Return the finding as the results file holds it."""
        found = {name: _rounded(value) for name, value in asdict(self.found).items()}
        return {**asdict(self), "found": found, "met": self.met}


@dataclass
class Findings:
    """Collects what an experiment measures, and prints it as it comes.

    Attributes:
        name: Also the name of the results file.
        module: The module that is run.
        settings: Sizes, rounds and the like.
        libraries: What the machine is described with besides its processor.
        findings: Those so far.
        details: What is behind them, by section.
    """

    name: str
    module: str
    settings: dict[str, Any]
    libraries: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, *findings: Finding) -> None:
        """Add the findings of a section that is done."""
        for one in findings:
            self.findings.append(one)
            print(one.line(), flush=True)

    def detail(self, section: str, found: Any) -> None:
        """Add what a section measured on the way."""
        self.details[section] = _rounded_throughout(found)

    def write(self, path: Path) -> None:
        """Write the results."""
        content = {
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "command": " ".join(["python", "-m", self.module, *sys.argv[1:]]),
            "machine": {**_machine(), **self.libraries},
            "settings": self.settings,
            "figures": [one.as_json() for one in self.findings],
            "details": self.details,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", "backslashreplace")
        print(f"written to {path}")

    def print_summary(self) -> None:
        """Print every finding once more, with its target."""
        print(f"\n{'':74} {'median':>9} {'unit':<12} {'(quartiles)':<22} {'target':<16}")
        for one in self.findings:
            print(one.line())


def _machine() -> dict[str, Any]:
    """Return where this is measured, and of which commit."""
    git = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 - our own
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
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
