"""Which faults a chaos run injects, in which order, how long and how hard: a function of the seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RESTARTS = ("kill", "drain")
PROXY = ("cut", "finish client", "finish server", "swallow", "hold", "delay", "refuse")
PACKETS = ("lost packets", "packet resets", "black hole")
"""They need nft and a network namespace."""
CALLERS = ("vanish", "slow readers", "bad frames", "oversized", "burst")
KINDS = (*RESTARTS, "stop", *PROXY, *PACKETS, *CALLERS)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: One of `KINDS`.
        pause_s: Seconds before it, after the one before is over.
        length_s: Seconds that it lasts, where it lasts.
        hardness: 0 to 1: how long a delay, how many packets, where a process is hit.
    """

    kind: str
    pause_s: float
    length_s: float
    hardness: float


def schedule(seed: int, kinds: Sequence[str] = KINDS) -> Iterator[Fault]:
    """The faults of a run, without end: round by round, each kind once a round, in random order.

    The restarts come first in a round, so that there is a process that lives through all the other kinds: it is the
    one whose memory and descriptors can be compared.
    """
    chance = random.Random(seed)
    while True:
        for group in ([k for k in kinds if k in RESTARTS], [k for k in kinds if k not in RESTARTS]):
            for kind in chance.sample(group, len(group)):
                yield Fault(kind, chance.uniform(0.1, 0.8), chance.uniform(0.3, 2.0), chance.random())
