"""A TCP port that is open while the server is ready: for balancers whose check can only connect.

The port of the calls is open before the warm-up, through a drain's delay and while the model fails, so a check that
only connects to it takes all of that for health.
"""

import asyncio
import logging
from typing import Final, Protocol

from bilm_server.addresses import split_address
from bilm_server.errors import BindError

_log = logging.getLogger(__name__)

GREETING: Final = b"READY\n"
"""Greeting sent to every connection before it is closed; a stopped process accepts, too, but sends nothing."""

_RETRY_S = 1.0


class Readiness(Protocol):
    """What the port follows."""

    @property
    def serving(self) -> bool:
        """Whether the server is ready."""

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set at the next change."""


class ReadinessPort:
    """Follows readiness in its own task: listening while the server is ready, always on the same port.

    Health never waits for the port. One that can't be opened again is an error in the log, once, and is tried again
    until it opens.
    """

    def __init__(self, listen: str, readiness: Readiness, retry_s: float = _RETRY_S) -> None:
        """Keep the address; call `start` to bind it.

        Args:
            listen: HOST:PORT; port 0: any free one, the same each time.
            readiness: is followed.
            retry_s: seconds between attempts to open a port that was taken by another process.
        """
        self._listen, self._readiness, self._retry_s = listen, readiness, retry_s
        self._host, self._port = split_address(listen)
        self._bound: asyncio.Server | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens, once it has started."""
        return self._port

    async def start(self) -> str:
        """Bind the address without listening on it, and follow readiness from now on; there is nothing to log.

        Raises:
            BindError: if the address can't be bound.
        """
        try:
            await self._bind()
        except OSError as error:
            raise BindError(f"ready_listen: can't listen on {self._listen}") from error
        self._following = asyncio.create_task(self._follow())
        return ""

    async def stop(self) -> None:
        """Close the port and follow no more; idempotent."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        self._close()

    async def _follow(self) -> None:
        while True:
            changed = self._readiness.changed
            if self._readiness.serving:
                await self._open(changed)
            else:
                self._close()
            await changed.wait()

    async def _open(self, changed: asyncio.Event) -> None:
        """Listen; try again until that works or readiness has changed."""
        failing = False
        while not changed.is_set():
            try:
                await self._bind()
                assert self._bound is not None  # noqa: S101 - _bind() has set it
                await self._bound.start_serving()
            except OSError as error:
                self._close()
                if not failing:
                    _log.error("can't listen on %s:%d (%s), trying again", self._host, self._port, error.strerror)
                failing = True
                await asyncio.wait([waiting := asyncio.ensure_future(changed.wait())], timeout=self._retry_s)
                waiting.cancel()
            else:
                _log.debug("open on %s:%d", self._host, self._port)
                return

    async def _bind(self) -> None:
        if self._bound is None:
            self._bound = await asyncio.start_server(_greet, self._host, self._port, start_serving=False)
            self._port = self._bound.sockets[0].getsockname()[1]

    def _close(self) -> None:
        if self._bound is not None:
            self._bound.close()
            self._bound = None


async def _greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    writer.close()  # six bytes are in the kernel's buffer by now, whether or not they are read
