"""Health checks beside the load: on a connection and a thread of their own, as a balancer would make them."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from bilm_client._core.settings import Settings
from bilm_client._transport.channels import sync_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc

CHECK_EVERY_S = 0.1
_TIMEOUT_S = 5.0
_Status = health_pb2.HealthCheckResponse.ServingStatus


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """A check that has ended.

    Attributes:
        took_s: Seconds since the moment it was meant for.
        status: The server's status, or "".
        error: gRPC's status where there is no response, or "".
    """

    took_s: float
    status: str = ""
    error: str = ""


class HealthProbe:
    """Checks health every 0.1 s, whether the last response is there or not; a context manager.

    It is that of the model that the settings name, else that of the server as a whole.

    Args:
        settings: How to connect.
        note: Takes each check, in gRPC's thread; checks under way when the context ends are left out.
    """

    def __init__(self, settings: Settings, note: Callable[[HealthCheck], None]) -> None:
        self._settings = settings
        self._note_check = note
        self._metadata = settings.call_metadata()
        self._request = health_pb2.HealthCheckRequest(service=settings.health_service)
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
        call = stub.Check.future(self._request, timeout=_TIMEOUT_S, metadata=self._metadata)
        call.add_done_callback(note)
        return call

    def _note(self, call: Any, meant_s: float) -> None:
        """Note a check that has ended, in gRPC's thread."""
        took_s = time.monotonic() - meant_s
        with self._lock:
            if self._ended.is_set():
                return
            if call.code() is grpc.StatusCode.OK:
                self._note_check(HealthCheck(took_s, status=_Status.Name(call.result().status)))
            else:
                self._note_check(HealthCheck(took_s, error=call.code().name))
