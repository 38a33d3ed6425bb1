"""The server's life in five verbs: start, load, serve, drain, stop."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bilm_server.errors import BindError, RefusalError
from bilm_server.own_thread import in_own_thread
from bilm_server.protocols.grpc.acceptor import Acceptor
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.grpc.interceptors import OpenCalls

if TYPE_CHECKING:  # torch comes with them, which is loaded behind the open port
    from bilm_server.embedding.embedder import Embedder
    from bilm_server.embedding.model_set import Changes, ModelSet
    from bilm_server.inference.watchdog import Watchdog

R = TypeVar("R")

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


class Door(Listener, Protocol):
    """A listener for calls beside gRPC's."""

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, give those in flight some time, and end."""


@dataclass(frozen=True)
class DrainTimes:
    """How long a drain takes.

    Attributes:
        delay_s: between NOT_SERVING and refusing new calls, for balancers to notice.
        grace_s: for calls in flight after that.
    """

    delay_s: float
    grace_s: float


@dataclass(frozen=True, eq=False)
class LoadedParts:
    """What there is once the models are loaded.

    Attributes:
        models: what embeds; stop with the server.
        start: starts the models.
        watchdog: reports to health.
        open: lets calls reach the models.
        later: loads what the first calls can do without, in a thread, when the server is SERVING.
    """

    models: "ModelSet"
    start: Callable[[], Coroutine[object, object, None]]
    watchdog: "Watchdog"
    open: Callable[[], None]
    later: Callable[[], object] = lambda: None


class Server:
    """A server; `app.build_server` puts it together."""

    def __init__(
        self,
        health: HealthReporter,
        acceptor: Acceptor,
        listeners: Sequence[Listener],
        load: Callable[[], LoadedParts],
        *,
        open_calls: OpenCalls,
        drain_times: DrainTimes,
        doors: Sequence[Door] = (),
        reload: "Callable[[], Coroutine[object, object, Changes]] | None" = None,
        prepare: Sequence[Callable[[], object]] = (),
        close: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Keep the parts; call `start` to start them.

        Args:
            health: what is reported.
            acceptor: listens for calls.
            listeners: start after it, in this order, and stop in the same.
            load: loads the models, in a thread; may take as long as it likes.
            open_calls: are ended when new calls are refused.
            drain_times: of `drain`.
            doors: listen for calls, too; start after the acceptor, drain with it, and stop after it.
            reload: see `Server.reload`; None: nothing can change.
            prepare: read what the configuration names, before anything listens.
            close: end what is left, after everything else; may block.
        """
        self._health, self._open_calls, self._load = health, open_calls, load
        self._acceptor, self._doors, self._listeners = acceptor, tuple(doors), (acceptor, *doors, *listeners)
        self._drain_times, self._prepare, self._close = drain_times, tuple(prepare), tuple(close)
        self._reload_asked = False
        self._reload, self._reloads = reload, set[asyncio.Task[Any]]()
        self._stop_asked = asyncio.Event()
        self._loading: threading.Thread | None = None
        self._parts: LoadedParts | None = None
        self._watching: asyncio.Task[None] | None = None
        self._later: asyncio.Task[None] | None = None

    @property
    def target(self) -> str:
        """Where clients find the server, once it has started."""
        return self._acceptor.target

    @property
    def doors(self) -> Sequence[Door]:
        """What listens for calls beside gRPC."""
        return self._doors

    @property
    def embedder(self) -> "Embedder":
        """What embeds by the default model, once that is loaded."""
        return self.models.registry.default

    @property
    def models(self) -> "ModelSet":
        """What embeds, once it is loaded."""
        assert self._parts is not None  # noqa: S101 - load() has made it
        return self._parts.models

    @property
    def loading(self) -> bool:
        """Whether the thread that loads still runs: after `stop`, when the server was stopped while it loaded."""
        loading = self._loading is not None and self._loading.is_alive()
        return loading or (self._parts is not None and self._parts.models.loading)

    async def start(self) -> None:
        """Check what the configuration names, and listen: health answers NOT_SERVING, calls find the model loading.

        Raises:
            BindError: if an address can't be listened on.
            ConfigurationError: if files for TLS or tokens are bad, or more connections are asked for than fit.
        """
        for step in self._prepare:
            step()
        for listener in self._listeners:
            if line := await listener.start():
                _log.info("%s", line)

    async def load(self) -> None:
        """Load the models behind the open port; SERVING when warm-ups have succeeded, or return when asked to stop.

        Raises:
            Exception: what loading or the warm-up pass raised.
        """
        loaded, self._loading = in_own_thread(self._load, "loading")
        parts = await self._unless_stopped(loaded)
        if parts is None:
            return
        self._parts = parts
        if not await self._unless_stopped(_done(parts.start())):
            return
        parts.open()
        parts.watchdog.look()  # nothing but the watchdog reports to health
        self._watching = asyncio.create_task(parts.watchdog.run())
        if self._reload_asked:
            self.ask_to_reload()
        self._later = asyncio.create_task(_load_later(parts.later))

    async def serve(self) -> None:
        """Return when `ask_to_stop` has been called.

        Raises:
            EngineLostError: if the engine can't continue in this process.
            BindError: if nothing listens any more.
        """
        ends = [asyncio.create_task(event.wait()) for event in (self._stop_asked, self._acceptor.lost)]
        watched = () if self._watching is None else (self._watching,)  # stopped while it loaded
        await asyncio.wait({*ends, *watched}, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if self._watching is not None and self._watching.done():
            self._watching.result()
        if self._acceptor.lost.is_set():
            raise BindError(f"listen: can't listen on {self.target} any more")

    def ask_to_stop(self) -> None:
        """End `load` and `serve`; may be called from a signal handler on the event loop."""
        self._stop_asked.set()

    async def reload(self) -> "Changes":
        """Serve what the configuration says now; it is done to its end, whoever stops waiting for it.

        Raises:
            RefusalError: RELOAD_FAILED or MODEL_LOADING; then nothing has changed.
        """
        assert self._reload is not None  # noqa: S101 - of a server that has anything to read again
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs what nobody awaits
        return await asyncio.shield(task)

    def ask_to_reload(self) -> None:
        """Reload; may be called from a signal handler on the event loop. What comes of it is in the log."""
        if self._parts is None or not self._parts.models.models:
            _log.info("reload: when the models are loaded")
            self._reload_asked = True
            return
        task = asyncio.create_task(_quietly(self.reload()))
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def drain(self) -> None:
        """Report NOT_SERVING, wait until balancers notice, then refuse new calls and let those in flight finish.

        A server that was never SERVING has nothing to wait for.
        """
        times = self._drain_times
        delay_s = times.delay_s if self._watching else 0.0
        _log.info(
            "draining: NOT_SERVING, new calls refused in %g s, calls in flight get %g s more", delay_s, times.grace_s
        )
        self._health.drain()
        await asyncio.sleep(delay_s)
        self._open_calls.end()  # a health watcher would hold the drain for all of the grace time
        await asyncio.gather(self._acceptor.stop(times.grace_s), *(door.drain(times.grace_s) for door in self._doors))

    async def stop(self) -> None:
        """End everything but the thread that loads; idempotent."""
        for listener in self._listeners:
            await listener.stop()
        for task in (self._watching, self._later, *self._reloads):
            if task is not None:
                task.cancel()
        await asyncio.gather(*self._reloads, return_exceptions=True)
        if self._parts is not None:
            await self._parts.models.stop()
        for close in self._close:
            await asyncio.to_thread(close)
        _log.info("stopped")

    # ---- loading ----

    async def _unless_stopped(self, work: "asyncio.Future[R]") -> R | None:
        """Return the result of `work`; None if `ask_to_stop` comes first, or if nothing listens any more."""
        ends = [asyncio.create_task(event.wait()) for event in (self._stop_asked, self._acceptor.lost)]
        first: set[asyncio.Future[Any]] = {work, *ends}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        if work.done():
            return work.result()
        work.cancel()
        return None


def _done(work: Coroutine[object, object, None]) -> "asyncio.Task[bool]":
    async def done() -> bool:
        await work
        return True

    return asyncio.ensure_future(done())


async def _quietly(reload: "Coroutine[object, object, Changes]") -> None:
    with suppress(RefusalError):
        await reload


async def _load_later(load: Callable[[], object]) -> None:
    try:
        await asyncio.to_thread(load)
    except Exception as error:
        _log.error("what texts need can't be loaded", exc_info=error)
