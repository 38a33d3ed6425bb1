"""Servers in this process; `server_processes` has those in processes of their own."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any
from unittest import mock

import grpc
from bilm_api.v1 import embed_pb2_grpc
from bilm_model.engine.types import Capacity
from bilm_model.kernels.product_paths import ProductPath
from bilm_model.tokenization.types import Tokenizer
from bilm_server.app import build_server
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.embedding.admission import Admission, Cost, StreamAdmission
from bilm_server.inference.worker import InferenceWorker
from bilm_server.lifecycle import Server
from bilm_server.preflight import plan_serving
from bilm_server.protocols.http.door import HttpDoor
from bilm_server.served_model import ServedModel, load_served_model

from tests.support.hooked_engine import HookedEngine

TINY = "random:tiny"
_NO_DELAY = ("--drain-delay-s", "0")
"""No balancer has to notice that a server ends."""
_CALL_TIMEOUT_S = 30.0
_QUIET_TIMEOUT_S = 20.0
_LOOK_INTERVAL_S = 0.002


def with_defaults(flags: Sequence[str], listen: str = "127.0.0.1:0") -> list[str]:
    """Return flags of `bilm-serve` for a server on a tiny model, unless they name another one."""
    model = () if "--model" in flags else ("--model", TINY)
    return [*model, "--listen", listen, *_NO_DELAY, *flags]


def new_server(config: ServerConfig, model: ServedModel) -> Server:
    """Return a server on a model that is loaded already."""
    return build_server(config, plan_serving(config), lambda _: model)


async def started(server: Server) -> None:
    """Start a server, and wait until it is SERVING."""
    await server.start()
    await server.load()


class LoopServer:
    """A server on an event loop of its own, in this process.

    Args:
        flags: of `bilm-serve`.
        bfloat16: how its machine computes bfloat16 products; None: as the present one does.
        tokenizer: makes of its tokenizer another one.
        worker: further arguments of its worker: the clock, the timing.

    Attributes:
        engine: what it computes with; set hooks to hold it or to let it fail.
    """

    def __init__(
        self,
        *flags: str,
        bfloat16: ProductPath | None = None,
        tokenizer: Callable[[Tokenizer], Tokenizer] | None = None,
        worker: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.config: ServerConfig = load_config(with_defaults(flags))
        model = load_served_model(self.config, bfloat16)
        self.engine: HookedEngine[Any] = HookedEngine(model.engine)
        changed = model.tokenizer if tokenizer is None else tokenizer(model.tokenizer)
        self.model: ServedModel = replace(model, engine=self.engine, tokenizer=changed)
        self._worker = worker
        self.server: Server = new_server(self.config, self.model)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._channels: list[grpc.Channel] = []

    def start(self) -> None:
        self._thread.start()
        with mock.patch("bilm_server.model_parts.InferenceWorker", partial(InferenceWorker, **self._worker)):
            self.call(partial(started, self.server))

    def stop(self) -> None:
        """Stop it; no task of it may be left on its loop."""
        for channel in self._channels:
            channel.close()
        try:
            self.call(self.server.stop)
            self._check_no_task_is_left()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Await a coroutine function of the server's on its loop."""
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(_CALL_TIMEOUT_S)

    @property
    def target(self) -> str:
        return self.server.target

    @property
    def http(self) -> HttpDoor:
        """Where it listens for HTTP."""
        (door,) = self.server.doors
        assert isinstance(door, HttpDoor)
        return door

    @property
    def admission(self) -> Admission:
        """What calls hold."""
        return self.server.embedder.admission

    @property
    def stream_admission(self) -> StreamAdmission:
        """What items of streams hold."""
        return self.server.embedder.stream_admission

    @property
    def worker(self) -> InferenceWorker:
        """What drives the engine."""
        return self.server.models.models[0].worker

    def channel(self) -> grpc.Channel:
        channel = grpc.insecure_channel(self.target, options=[("grpc.max_receive_message_length", 20 * 2**20)])
        self._channels.append(channel)
        return channel

    def stub(self) -> embed_pb2_grpc.EmbedServiceStub:
        return embed_pb2_grpc.EmbedServiceStub(self.channel())

    def check_nothing_is_left(self, timeout_s: float = _QUIET_TIMEOUT_S) -> None:
        """Wait until nothing waits, nothing is in flight and nothing is reserved.

        Raises:
            AssertionError: Something is still there after `timeout_s`; the message says what.
        """
        wait_for_nothing("the server still holds", self._held, timeout_s)

    def _held(self) -> dict[str, Any]:
        embedder, worker, engine = self.server.embedder, self.worker, self.engine
        found = {
            "admitted": self.admission.used != Cost(0, 0) and self.admission.used,
            "admitted of streams": self.stream_admission.used != Cost(0, 0) and self.stream_admission.used,
            "waiting": worker.waiting,
            "in flight": worker.in_flight,
            "futures": worker.pending,
            "anything else": not embedder.idle,
            "sentences in the engine": engine.in_flight,
            "capacity of the engine": engine.used != Capacity(0, 0) and engine.used,
        }
        return {name: what for name, what in found.items() if what}

    def _check_no_task_is_left(self) -> None:
        async def tasks() -> list[str]:
            return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

        wait_for_nothing("tasks of a stopped server", lambda: self.call(tasks))


def wait_for_nothing(what: str, found: Callable[[], Any], timeout_s: float = _QUIET_TIMEOUT_S) -> None:
    """Wait until a function finds nothing; what it still finds in the end fails the test."""
    deadline_s = time.monotonic() + timeout_s
    while left := found():
        assert time.monotonic() < deadline_s, f"{what}: {left}"
        time.sleep(_LOOK_INTERVAL_S)


@contextmanager
def serving(*flags: str, busy: bool = False, **parts: Any) -> Iterator[LoopServer]:
    """Run a server in this process; when it ends, check that nothing is left of any call.

    Args:
        flags: further ones of `bilm-serve`.
        busy: whether calls may still be under way when it is stopped.
        parts: see `LoopServer`.
    """
    server = LoopServer(*flags, **parts)
    try:
        server.start()
        yield server
        if not busy:
            server.check_nothing_is_left()
    finally:
        server.stop()
