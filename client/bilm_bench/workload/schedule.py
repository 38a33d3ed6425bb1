"""When calls are meant to be sent, and with what. Pure; the random numbers are an argument."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

_MOST_STEPS = 200
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Step:
    """A stretch of constant load.

    Attributes:
        load: Sentences a second of an open loop, callers of a closed one.
        length_s: Seconds in which calls are sent.
    """

    load: float
    length_s: float


def parse_ramp(text: str) -> tuple[float, ...]:
    """Return loads from "50,100,200", or from "50:200:4" (from, to, number of steps).

    Raises:
        ValueError: It is neither, or a load isn't positive.
    """
    try:
        if ":" in text:
            first, last, count = text.split(":")
            loads = _evenly(float(first), float(last), int(count))
        else:
            loads = tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError("expected loads as in 50,100,200, or from:to:steps as in 50:200:4") from error
    if not 1 <= len(loads) <= _MOST_STEPS:
        raise ValueError(f"expected 1 to {_MOST_STEPS} steps, found {len(loads)}")
    if not all(0 < load < float("inf") for load in loads):
        raise ValueError("every load must be positive and finite")
    return loads


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    if not 2 <= count <= _MOST_STEPS:
        raise ValueError
    return tuple(first + (last - first) * number / (count - 1) for number in range(count))


def parse_duration_s(text: str) -> float:
    """Return the seconds of "90", "90s", "30m", "2h" or "1d".

    Raises:
        ValueError: It is none of them, or 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not seconds:
        raise ValueError("expected a duration such as 90s, 30m or 2h")
    return seconds


def arrivals_s(per_s: float, length_s: float, random: Random) -> Iterator[float]:
    """Yield the moments of a Poisson process, in seconds from its beginning."""
    at_s = random.expovariate(per_s)
    while at_s < length_s:
        yield at_s
        at_s += random.expovariate(per_s)


def in_rounds(values: Sequence[_T], random: Random) -> Iterator[_T]:
    """Yield the values without end, each once a round, in another order each time."""
    order = list(values)
    while True:
        random.shuffle(order)
        yield from order
