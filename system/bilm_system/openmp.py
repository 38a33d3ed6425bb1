"""How long OpenMP's threads wait for work by spinning, which has to be settled before OpenMP is loaded."""

from collections.abc import MutableMapping

_SPINS = "10000"
"""Looks at the next parallel region, about 0.5 ms where a pause takes 140 cycles. Products follow each other by less;
libgomp's own default of 300,000 keeps a core busy for 15 ms after each round."""


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Let libgomp's threads fall asleep soon after a parallel region, unless the environment says how they wait.

    Args:
        environment: of this process, before it loads libgomp, which comes with torch.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
