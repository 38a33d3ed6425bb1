"""Rounds written down for tests of back ends."""

import numpy as np
from bilm_model.engine.planner import RoundPlan


def plan_of(lanes: list[list[int]], first_place: int = 0) -> RoundPlan:
    """Lanes that run the sentences of these lengths one after another; a step's place is its token, too."""
    order = sorted(range(len(lanes)), key=lambda lane: -sum(lanes[lane]))
    begins = dict(zip(range(len(lanes)), np.cumsum([0, *map(sum, lanes)]) + first_place, strict=False))
    columns: dict[int, list[tuple[int, int, bool]]] = {}
    for lane, lengths in enumerate(lanes):
        first = int(begins[lane])
        columns[lane] = []
        for length in lengths:
            columns[lane] += [(first + i, first + length - 1 - i, i == 0) for i in range(length)]
            first += length
    steps = [(lane, columns[lane][tick]) for tick in range(32) for lane in order if tick < len(columns[lane])]
    last = {lane: i for i, (lane, _) in enumerate(steps)}
    return RoundPlan(
        slots=np.array(order),
        sizes=tuple(n for tick in range(32) if (n := sum(tick < len(columns[lane]) for lane in order))),
        places=np.array([[forward for _, (forward, _, _) in steps], [backward for _, (_, backward, _) in steps]]),
        last=np.array([last[lane] for lane in order]),
        fresh=np.array([fresh for _, (_, _, fresh) in steps]),
    )
