"""The server's life in four verbs: start, serve, drain, stop."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bilm_server.embedding.embedder import Embedder
from bilm_server.errors import BindError
from bilm_server.inference.watchdog import Watchdog
from bilm_server.protocols.grpc.acceptor import Acceptor
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.grpc.interceptors import OpenCalls

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Something that listens on its own address."""

    async def start(self) -> str:
        """Listen, and return the line that the log has about it; "" for none.

        Raises:
            BindError: if the address can't be listened on.
        """

    async def stop(self) -> None:
        """Listen no more; idempotent."""


@dataclass(frozen=True)
class DrainTimes:
    """How long a drain takes.

    Attributes:
        delay_s: between NOT_SERVING and refusing new calls, for balancers to notice.
        grace_s: for calls in flight after that.
    """

    delay_s: float
    grace_s: float


class Server:
    """A server on one model; `app.build_server` puts it together.

    Attributes:
        embedder: what embeds.
    """

    def __init__(
        self,
        embedder: Embedder,
        health: HealthReporter,
        watchdog: Watchdog,
        acceptor: Acceptor,
        listeners: Sequence[Listener],
        *,
        open_calls: OpenCalls,
        drain_times: DrainTimes,
        prepare: Sequence[Callable[[], object]] = (),
        close: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Keep the parts; call `start` to start them.

        Args:
            embedder: what embeds; its worker starts and stops with the server.
            health: what is reported.
            watchdog: reports to it.
            acceptor: listens for calls.
            listeners: start after it, in this order, and stop in the same.
            open_calls: are ended when new calls are refused.
            drain_times: of `drain`.
            prepare: read what the configuration names, before anything listens.
            close: end what is left, after everything else; may block.
        """
        self.embedder = embedder
        self._health, self._watchdog, self._open_calls = health, watchdog, open_calls
        self._acceptor, self._listeners = acceptor, (acceptor, *listeners)
        self._drain_times, self._prepare, self._close = drain_times, tuple(prepare), tuple(close)
        self._stop_asked = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @property
    def target(self) -> str:
        """Where clients find the server, once it has started."""
        return self._acceptor.target

    async def start(self) -> None:
        """Listen at once, NOT_SERVING; SERVING when a warm-up pass has succeeded.

        Raises:
            BindError: if an address can't be listened on.
            ConfigurationError: if files for TLS or tokens are bad, or more connections are asked for than fit.
            Exception: what the warm-up pass raised.
        """
        for step in self._prepare:
            step()
        for listener in self._listeners:
            if line := await listener.start():
                _log.info("%s", line)
        await self.embedder.worker.start()
        self._watchdog.look()  # nothing but the watchdog reports to health
        self._watching = asyncio.create_task(self._watchdog.run())

    async def serve(self) -> None:
        """Return when `ask_to_stop` has been called.

        Raises:
            EngineLostError: if the engine can't continue in this process.
            BindError: if nothing listens any more.
        """
        assert self._watching  # noqa: S101 - start() comes first
        ends = [asyncio.create_task(event.wait()) for event in (self._stop_asked, self._acceptor.lost)]
        await asyncio.wait({*ends, self._watching}, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if self._watching.done():
            self._watching.result()
        if self._acceptor.lost.is_set():
            raise BindError(f"listen: can't listen on {self.target} any more")

    def ask_to_stop(self) -> None:
        """End `serve`; may be called from a signal handler on the event loop."""
        self._stop_asked.set()

    async def drain(self) -> None:
        """Report NOT_SERVING, wait until balancers notice, then refuse new calls and let those in flight finish."""
        times = self._drain_times
        _log.info(
            "draining: NOT_SERVING, new calls refused in %g s, calls in flight get %g s more",
            times.delay_s, times.grace_s,
        )  # fmt: skip
        self._health.drain()
        await asyncio.sleep(times.delay_s)
        self._open_calls.end()  # a health watcher would hold the drain for all of the grace time
        await self._acceptor.stop(times.grace_s)

    async def stop(self) -> None:
        """End everything; idempotent."""
        for listener in self._listeners:
            await listener.stop()
        if self._watching is not None:
            self._watching.cancel()
        await self.embedder.worker.stop()
        for close in self._close:
            await asyncio.to_thread(close)
        _log.info("stopped")
