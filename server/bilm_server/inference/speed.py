"""How fast the engine is: steps a second, of its last seconds of work. Pure: no clock of its own."""

_GUESS_PER_S, _GUESS_S = 5000.0, 0.1
"""What counts as measured before anything is: only the pushback of the first refusals depends on it."""

_HALF_LIFE_S = 2.0
"""Of work, not of time: an idle engine is as fast as it was."""

_LEAST_PER_S = 1.0
"""So that dividing by the speed always gives a time."""


class Speed:
    """A mean over time, in which a second of work counts half as much after two more of them."""

    def __init__(self) -> None:
        self._steps, self._seconds = _GUESS_PER_S * _GUESS_S, _GUESS_S

    def add(self, steps: int, seconds: float) -> None:
        """Count a round that advanced sentences by so many steps together."""
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        self._steps = kept * self._steps + steps
        self._seconds = kept * self._seconds + seconds

    @property
    def steps_per_s(self) -> float:
        """At least 1."""
        return max(_LEAST_PER_S, self._steps / self._seconds)
