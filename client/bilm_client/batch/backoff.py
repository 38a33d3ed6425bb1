"""Going on trying while the server is away, as it is for a while when it is restarted."""

import asyncio
import random
import sys
import time

from tqdm import tqdm

from bilm_client.errors import BilmError, DeadlineError, OverloadedError, UnavailableError

PASSING = (UnavailableError, OverloadedError, DeadlineError)
"""What a restart or a busy hour of the server's looks like, once the client's own retries are used up."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0


class Patience:
    """How long a run goes on without anything having worked; shared by its workers."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def renew(self) -> None:
        """Something has worked."""
        if self._since_s is not None:
            tell("the server answers again")
        self._since_s = None
        self._pause_s = _FIRST_PAUSE_S

    async def wait(self, error: BilmError) -> None:
        """Pauses, longer each time.

        Raises:
            BilmError: the given one, when nothing has worked for too long.
        """
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
            if self._limit_s > 0:
                tell(f"{error}; trying again for up to {self._limit_s:g} s")
        if now_s - self._since_s >= self._limit_s:
            raise error
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads callers, hides nothing
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)


def tell(message: str) -> None:
    """Print a line on standard error, above the progress bar."""
    tqdm.write(f"bilm-embed: {message}", file=sys.stderr)
