"""Retries of a run while the server is unavailable, as during a restart."""

import asyncio
import random
import sys
import time

from tqdm import tqdm

from bilm_client.errors import BilmError, DeadlineError, OverloadedError, UnavailableError

PASSING = (UnavailableError, OverloadedError, DeadlineError)
"""Errors of a server that restarts or is overloaded, once the client's own retries are used up."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0


class Backoff:
    """Growing pauses between attempts, up to a time without a success; shared by a run's workers.

    Args:
        limit_s: Time without a success after which the run gives up.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def reset(self) -> None:
        """Note a success."""
        if self._since_s is not None:
            print_line("the server answers again")
        self._since_s = None
        self._pause_s = _FIRST_PAUSE_S

    async def wait(self, error: BilmError) -> None:
        """Pause, longer each time.

        Raises:
            BilmError: `error`, once there has been no success for too long.
        """
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
            if self._limit_s > 0:
                print_line(f"{error}; trying again for up to {self._limit_s:g} s")
        if now_s - self._since_s >= self._limit_s:
            raise error
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads callers, hides nothing
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)


def print_line(message: str) -> None:
    """Print a line on standard error, above the progress bar."""
    tqdm.write(f"bilm-embed: {message}", file=sys.stderr)
