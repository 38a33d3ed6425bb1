"""Conditions on a report's metrics, for CI: `accepted.p99_ms>500`."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from bilm_bench.statistics.metrics import metrics_of_nothing

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_FORM = re.compile(r"\s*([a-z][a-z0-9_.]*)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """A comparison of a metric that must not hold.

    Attributes:
        name: Path of the metric, with dots.
        comparison: >, >=, < or <=.
        bound: What the metric is compared with.
    """

    name: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return a condition from its text.

        Raises:
            ValueError: It isn't FIGURE>NUMBER (or >=, <, <=), or there is no such metric.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"expected FIGURE>NUMBER (or >=, <, <=), found {text!r}")
        if found[1] not in (names := dict(flat(metrics_of_nothing()))):
            raise ValueError(f"no figure {found[1]!r}; there are {', '.join(names)}")
        return cls(found[1], found[2], float(found[3]))

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.bound:g}"

    def is_violated(self, value: float | None) -> bool:
        """Return whether the comparison holds; what wasn't measured violates it, save of refused calls."""
        if value is None:
            return not self.name.startswith("refused.")
        return _OPERATORS[self.comparison](value, self.bound)


def flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield the numbers among the metrics, each with its path."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield prefix + name, value
