"""How much work is let in: bounded by tokens and by the bytes of the answers, so that memory is, too."""

from dataclasses import dataclass

from bilm_api.constants import NEVER_RETRY, Reason

from bilm_server.errors import RefusalError

_MIN_PUSHBACK_MS, _MAX_PUSHBACK_MS = 20, 10_000  # never 0: a gRPC client hangs on that until its deadline


def pushback_ms(seconds: float) -> int:
    """When to come back after a refusal, for what is expected to take so long."""
    return max(_MIN_PUSHBACK_MS, min(_MAX_PUSHBACK_MS, int(1000 * seconds)))


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes up.

    Attributes:
        tokens: to compute.
        answer_bytes: to hold until they are sent.
    """

    tokens: int
    answer_bytes: int


class Admission:
    """Room for calls, which are refused where there is none; used from the event loop only."""

    def __init__(self, max_tokens: int, max_answer_bytes: int) -> None:
        self.capacity = Cost(max_tokens, max_answer_bytes)
        """What there is room for."""
        self._used = Cost(0, 0)

    @property
    def used(self) -> Cost:
        """What is in."""
        return self._used

    def reserve(self, cost: Cost, retry_after_ms: int) -> "Reservation":
        """Take room, which the reservation gives back.

        Raises:
            RefusalError: OVERLOADED with the given pushback, if there is no room now.
        """
        self.take(cost, retry_after_ms)
        return Reservation(self, cost)

    def take(self, cost: Cost, retry_after_ms: int) -> None:
        """Takes room; give it back with `release`, all at once or bit by bit.

        Raises:
            RefusalError: OVERLOADED with the given pushback, if there is no room now.
        """
        if not self._fits(cost):
            raise RefusalError(Reason.OVERLOADED, "too much work is waiting already; try again", retry_after_ms)
        self._take(cost)

    def release(self, cost: Cost) -> None:
        """Gives room back."""
        self._used = Cost(self._used.tokens - cost.tokens, self._used.answer_bytes - cost.answer_bytes)

    def _fits(self, cost: Cost) -> bool:
        return (
            self._used.tokens + cost.tokens <= self.capacity.tokens
            and self._used.answer_bytes + cost.answer_bytes <= self.capacity.answer_bytes
        )

    def _take(self, cost: Cost) -> None:
        self._used = Cost(self._used.tokens + cost.tokens, self._used.answer_bytes + cost.answer_bytes)


class Reservation:
    """Room that a piece of work holds, changed as its cost becomes known."""

    def __init__(self, admission: Admission, cost: Cost) -> None:
        """Hold what has been taken; see `Admission.reserve`."""
        self._admission, self._cost = admission, cost
        self._released = False

    def resize(self, cost: Cost, retry_after_ms: int) -> None:
        """Hold so much from now on.

        Raises:
            RefusalError: OVERLOADED with the given pushback, if that is more and there is no room for it now; then
                nothing has changed.
        """
        if self._released:
            return
        more = Cost(cost.tokens - self._cost.tokens, cost.answer_bytes - self._cost.answer_bytes)
        if more.tokens > 0 or more.answer_bytes > 0:
            self._admission.take(more, retry_after_ms)
        else:
            self._admission.release(Cost(-more.tokens, -more.answer_bytes))
        self._cost = cost

    def shrink(self, cost: Cost) -> None:
        """Hold only so much from now on, which must not be more."""
        self.resize(cost, NEVER_RETRY)

    def release(self) -> None:
        """Give everything back; idempotent."""
        if not self._released:
            self.shrink(Cost(0, 0))
            self._released = True
