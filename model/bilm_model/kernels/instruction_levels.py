"""Levels of instruction sets, by which kernels can be compiled for machines that aren't this one.

Source: the x86-64 psABI's microarchitecture levels, in LLVM's names of features.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class InstructionLevel:
    """A level.

    Attributes:
        name: LLVM's name of a processor with it.
        features: LLVM's names of what it has, beyond the level below.
    """

    name: str
    features: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that have Numba compile for the level, and kernels choose what they choose on such a machine."""
        return {"NUMBA_CPU_NAME": self.name, "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in self.features)}

    def within(self, features: Mapping[str, bool]) -> bool:
        """Return whether a processor with these features has it."""
        return all(features.get(name, False) for name in self.features)


_V2 = ("cx16", "sahf", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
LEVELS = (InstructionLevel("x86-64-v4", _V4), InstructionLevel("x86-64-v3", _V3))
"""Those that kernels are shipped for, the higher one first."""


def level_of(features: Mapping[str, bool]) -> InstructionLevel | None:
    """Return the highest level that a processor with these features has; None: none that kernels are shipped for."""
    return next((level for level in LEVELS if level.within(features)), None)
