"""How much the engine works, of the last seconds of time: what clients and balancers weigh servers by. Pure."""

import math
from dataclasses import dataclass

from bilm_server.inference.types import RoundReport

_HALF_LIFE_S = 5.0
"""Of time, not of work: an idle engine's load falls."""


@dataclass(frozen=True, slots=True)
class Load:
    """A mean over the last seconds.

    Attributes:
        tokens_per_s: tokens and boundaries computed.
        utilization: share of the engine's rows that were in use, above 0 and at most 1.
    """

    tokens_per_s: float
    utilization: float


class LoadMeter:
    """An exponential mean over time: what was measured `_HALF_LIFE_S` ago counts half.

    One thread adds rounds, any thread reads. The quotient of both numbers is the tokens a second at which the rows in
    use advance, extrapolated to all rows, however many calls come: a server's capacity. The share of time in which the
    engine computes would not do: where calls are few and rounds slow, sentences gather in the rows, rounds follow each
    other, and tokens a second of computing are those that come.
    """

    def __init__(self) -> None:
        self._mean = (0.0, 0.0, 0.0)  # tokens/s, utilization, and the time of both: replaced as one

    def add(self, report: RoundReport, max_rows: int, now_s: float) -> None:
        """Count a round that has just ended.

        Args:
            report: of the round.
            max_rows: of its engine.
            now_s: on a monotonic clock.
        """
        if report.seconds <= 0:
            return
        tokens_per_s, utilization, since_s = self._mean
        kept, share = _weight(now_s - since_s), 1 - _weight(report.seconds)
        self._mean = (
            kept * tokens_per_s + share * report.steps / report.seconds,
            kept * utilization + share * report.rows / max_rows,
            now_s,
        )

    def load(self, now_s: float) -> Load | None:
        """Return the load; None where nothing was computed for so long that it is 0.

        Args:
            now_s: on the clock of `add`.
        """
        tokens_per_s, utilization, since_s = self._mean
        kept = _weight(now_s - since_s)
        if not (tokens_per_s * kept and utilization * kept):
            return None
        return Load(tokens_per_s * kept, utilization * kept)


def _weight(age_s: float) -> float:
    return math.exp2(-max(0.0, age_s) / _HALF_LIFE_S)
