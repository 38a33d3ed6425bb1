"""Limits of one caller: calls at a time, and tokens per second on average."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from bilm_api.constants import Reason

from bilm_server.embedding.admission import NOTHING, Cost, Reservation
from bilm_server.errors import RefusalError

_MAX_CALLERS = 4096
_LOOKS = 8  # at callers that might be forgotten, for each new one
_MIN_PUSHBACK_MS, _MAX_CALL_PUSHBACK_MS = 20, 10_000  # never 0: a gRPC client hangs on that until its deadline
_MIN_WAIT_S = 0.001
_DURATION_WEIGHT = 0.2


@dataclass(eq=False)
class _Account:
    """What is known of one caller.

    Attributes:
        level: tokens in the bucket, at the time `filled_s`.
        calls: under way.
        waiters: items of streams that wait for tokens.
        mean_call_s: how long calls take, lately.
        turn: of those that wait.
    """

    level: float
    filled_s: float
    calls: int = 0
    waiters: int = 0
    mean_call_s: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def idle(self) -> bool:
        return not (self.calls or self.waiters)


@dataclass(eq=False)
class Charge:
    """What a call takes out of its caller's bucket.

    Attributes:
        tokens: how many; an estimate until they are counted.
    """

    tokens: int


class CallerLimits:
    """Limits for each caller by itself; used from the event loop only.

    Tokens come out of a bucket that fills at the given rate and holds two requests of the largest size, or what comes
    in a second if that is more. `Embed` may empty it; streams leave half of it, so that a caller's bulk work doesn't
    keep its other calls out: streams get what those leave. An item of a stream that is larger than that half takes the
    bucket below zero, and others wait the longer.

    The least recently used callers without calls are forgotten; one that comes back begins with a full bucket.
    """

    def __init__(
        self,
        tokens_per_s: float,
        max_calls: int,
        largest_request_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        max_callers: int = _MAX_CALLERS,
    ) -> None:
        """Set the limits.

        Args:
            tokens_per_s: on average; 0: no limit.
            max_calls: at a time, a stream being one; 0: no limit.
            largest_request_tokens: that a single `Embed` may have.
            clock: seconds, monotonic.
            sleep: waits for so many seconds.
            max_callers: that are remembered; more only while more have calls under way.
        """
        self._tokens_per_s, self._max_calls = tokens_per_s, max_calls
        self._burst = max(2.0 * largest_request_tokens, tokens_per_s)
        self._clock, self._sleep, self._max_callers = clock, sleep, max_callers
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def __len__(self) -> int:
        """Callers that are remembered."""
        return len(self._accounts)

    def call(self, caller: str) -> Reservation:
        """Count a call until the reservation is released.

        Raises:
            RefusalError: CALLER_LIMIT, if the caller has as many already; with the time that it takes until one of them
                ends, as far as the last ones tell.
        """
        if not self._max_calls:
            return Reservation(NOTHING, _keep)
        account = self._account(caller)
        if account.calls >= self._max_calls:
            raise RefusalError(
                Reason.CALLER_LIMIT,
                f"this caller has {account.calls} calls under way, as many as it may; try again",
                min(_pushback_ms(account.mean_call_s / account.calls), _MAX_CALL_PUSHBACK_MS),
            )
        account.calls += 1
        begun_s = self._clock()

        def end(_: Cost) -> None:
            account.calls -= 1
            account.mean_call_s += _DURATION_WEIGHT * (self._clock() - begun_s - account.mean_call_s)

        return Reservation(NOTHING, end)

    def charge(self, caller: str, tokens: int) -> None:
        """Take the tokens of an `Embed` out of the caller's bucket.

        Raises:
            RefusalError: CALLER_LIMIT, if they aren't there; with the time after which they will be.
        """
        if not self._tokens_per_s:
            return
        account = self._account(caller)
        if (missing_s := self._missing_s(account, min(tokens, self._burst / 2))) > 0:
            raise RefusalError(
                Reason.CALLER_LIMIT,
                f"this caller may have {self._tokens_per_s:g} tokens/s on average, and has had them; try again",
                _pushback_ms(missing_s),
            )
        account.level -= tokens

    def correct(self, caller: str, tokens: int) -> None:
        """Take so many tokens more for what has been charged, or give back: less than 0.

        The bucket may fall below zero, and the caller's next calls wait the longer.
        """
        if self._tokens_per_s:
            self._account(caller).level -= tokens  # what overflows is lost when it is looked at next

    def charged(self, caller: str, tokens: int) -> AbstractContextManager[Charge]:
        """Return a context that charges the tokens of an `Embed`, and in the end what its block has set in the charge.

        An error of the block costs nothing. Entering it raises:
            RefusalError: CALLER_LIMIT, see `charge`.
        """
        return self._charged(caller, tokens) if self._tokens_per_s else nullcontext(Charge(tokens))

    @contextmanager
    def _charged(self, caller: str, tokens: int) -> Iterator[Charge]:
        self.charge(caller, tokens)
        charge = Charge(tokens)
        try:
            yield charge
        except BaseException:
            charge.tokens = 0
            raise
        finally:
            self.correct(caller, charge.tokens - tokens)

    async def acquire(self, caller: str, tokens: int) -> None:
        """Take the tokens of a stream's item, once they are there; first come, first served among a caller's items."""
        if not self._tokens_per_s:
            return
        account = self._account(caller)
        account.waiters += 1
        try:
            async with account.turn:
                while (missing_s := self._missing_s(account, self._burst / 2)) > 0:
                    await self._sleep(max(missing_s, _MIN_WAIT_S))
                account.level -= tokens
        finally:
            account.waiters -= 1

    def _missing_s(self, account: _Account, needed: float) -> float:
        now_s = self._clock()
        account.level = min(self._burst, account.level + self._tokens_per_s * (now_s - account.filled_s))
        account.filled_s = now_s
        return (needed - account.level) / self._tokens_per_s

    def _account(self, caller: str) -> _Account:
        account = self._accounts.get(caller)
        if account is None:
            self._forget()  # before: the new one is idle, too
            account = self._accounts[caller] = _Account(self._burst, self._clock())
        self._accounts.move_to_end(caller)
        return account

    def _forget(self) -> None:
        for _ in range(_LOOKS):
            if len(self._accounts) < self._max_callers:
                return
            caller, account = next(iter(self._accounts.items()))
            if account.idle:
                del self._accounts[caller]
            else:
                self._accounts.move_to_end(caller)  # it is in use right now


def _keep(_: Cost) -> None:
    """Give nothing back: nothing was counted."""


def _pushback_ms(seconds: float) -> int:
    return max(_MIN_PUSHBACK_MS, math.floor(1000 * seconds) + 1)  # rounded up, and past the roundings of the bucket
