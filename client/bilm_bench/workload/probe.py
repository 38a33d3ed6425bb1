"""Health checks beside the load: on a connection and a thread of their own, as a balancer would make them."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from bilm_client._core.settings import Settings
from bilm_client._transport.channels import sync_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bilm_bench.statistics.histogram import Histogram

CHECK_EVERY_S = 0.1
_TIMEOUT_S = 5.0
_Status = health_pb2.HealthCheckResponse.ServingStatus


@dataclass(eq=False)
class HealthTally:
    """What came of the checks.

    Attributes:
        latencies: of those that were answered, since the moment they were meant for.
        statuses: answers by status.
        errors: checks without an answer, by gRPC status.
    """

    latencies: Histogram = field(default_factory=Histogram)
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


class HealthProbe:
    """Checks the server's health every 0.1 s, whether the last answer is there or not; a context manager.

    Args:
        settings: how to connect.

    Attributes:
        tally: what came of it; complete once the context has ended. Checks under way then are left out.
    """

    def __init__(self, settings: Settings) -> None:
        self.tally = HealthTally()
        self._settings = settings
        self._metadata = settings.call_metadata()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bilm-bench-health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with sync_channel(self._settings) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            self._send(stub, lambda _: None).exception()  # connects; that is not what is to be measured
            meant_s = time.monotonic()
            while not self._ended.wait(max(0.0, meant_s - time.monotonic())):
                self._send(stub, lambda call, meant_s=meant_s: self._note(call, meant_s))
                meant_s += CHECK_EVERY_S

    def _send(self, stub: Any, note: Any) -> Any:
        call = stub.Check.future(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S, metadata=self._metadata)
        call.add_done_callback(note)
        return call

    def _note(self, call: Any, meant_s: float) -> None:
        """In gRPC's thread."""
        took_s = time.monotonic() - meant_s
        with self._lock:
            if self._ended.is_set():
                return
            if call.code() is grpc.StatusCode.OK:
                self.tally.latencies.record(took_s)
                self.tally.statuses[_Status.Name(call.result().status)] += 1
            else:
                self.tally.errors[call.code().name] += 1
