"""The highest open load at which a server keeps its latency: calls of one sentence, whenever a Poisson process says.

A latency counts from the moment for which the call was meant, so that a slow server can't slow its load down.
"""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.load.load import LoadGenerator

P99_LIMIT_MS = 500.0
CALLERS = 192
"""With a call of one sentence each, they fill every row and every batch."""

_LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # of what closed callers got through
_BACKLOG_S = 2.0  # of calls under way; with more, the server has lost
_LEAST_BACKLOG = 64
_STEPS = 4  # of a search
_WIDER = 1.2  # bounds that turn out not to be
_MOST_STEPS = 10

Step = dict[str, Any]
Generators = Mapping[str, LoadGenerator]


def capacity(generator: LoadGenerator, step_s: float) -> float:
    """Return the sentences a second that closed callers get."""
    answer = generator.closed(CALLERS, 1, step_s / 3, step_s / 2)
    return float(answer["sentences"] / answer["seconds"])


def sweep(generators: Generators, capacities: Mapping[str, float], step_s: float) -> dict[str, list[Step]]:
    """Raise the load, the contestants in turn, each until it has lost."""
    found: dict[str, list[Step]] = {name: [] for name in generators}
    for number, share in enumerate(_LOADS):
        for name, generator in generators.items():
            if not found[name] or held(found[name][-1]):
                found[name].append(take_step(generator, share * capacities[name], step_s, number))
                print(f"  {name}: {in_words(found[name][-1])}", flush=True)
    return found


def take_step(generator: LoadGenerator, rate: float, step_s: float, seed: int) -> Step:
    """Offer so many calls a second."""
    return generator.open(rate, step_s, seed, math.ceil(_BACKLOG_S * rate) + _LEAST_BACKLOG)


def held(step: Step) -> bool:
    """Return whether the latency stayed within the limit."""
    return bool(step["p99_ms"] <= P99_LIMIT_MS and not step["gave_up"])


def bounds(steps: list[Step]) -> tuple[float, float]:
    """Return loads between which a contestant's limit lies, with room for the machine's moods."""
    held_rates = [step["offered_per_s"] for step in steps if held(step)]
    lost_rates = [step["offered_per_s"] for step in steps if not held(step)]
    low = max(held_rates, default=min(lost_rates, default=1.0) / 4)
    return 0.85 * low, 1.1 * min(lost_rates, default=1.5 * low)


def sustained(generator: LoadGenerator, between: tuple[float, float], step_s: float, searched: list[Step]) -> float:
    """Return the highest load that held, halving the (relative) distance step by step.

    Args:
        generator: of the server.
        between: loads between which to begin.
        step_s: seconds of each load.
        searched: receives the steps.
    """
    low, high = between
    held_rates: list[float] = []
    lost_rates: list[float] = []
    while len(held_rates) + len(lost_rates) < (_STEPS if held_rates and lost_rates else _MOST_STEPS):
        rate = math.sqrt(low * high)
        step = take_step(generator, rate, step_s, 100 + len(searched))
        searched.append(step)
        if held(step):
            held_rates.append(rate)
            low, high = rate, high if lost_rates else _WIDER * high
        else:
            lost_rates.append(rate)
            low, high = low if held_rates else low / _WIDER, rate
    print(f"  held {max(held_rates, default=0.0):,.1f} sentences/s", flush=True)
    return max(held_rates, default=low)


def in_words(step: Step) -> str:
    """Return a step for the screen."""
    return (
        f"{step['offered_per_s']:,.1f} offered, {step['completed_per_s']:,.1f} completed sentences/s, "
        f"p50 {step['p50_ms']:,.0f} ms, p99 {step['p99_ms']:,.0f} ms, {step['failed']} failed, "
        f"generator {step['generator_cores']:.2f} cores"
    )
