"""A real server in its own process, on a tiny random model, for tests."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bilm_client._transport.channels import new_channel

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
_LOOK_INTERVAL_S = 0.5
_RECONNECT_FAST = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class ServerStartError(Exception):
    """The server exited, or wasn't ready in time; the message holds what it wrote to its standard error."""


@dataclass(frozen=True)
class RunningServer:
    """A server to talk to.

    Attributes:
        target: Its address, as a client takes it.
        process_id: Its process.
    """

    target: str
    process_id: int


class ServerProcess:
    """Starts a server and stops it, as a context manager that gives a `RunningServer`.

    Args:
        model: The model, as `bilm-serve --model` takes it.
        arguments: Further arguments of bilm-serve.
        start_timeout_s: Seconds until it must be SERVING.
        environment: Variables besides this process's own.
    """

    def __init__(
        self,
        model: str = "random:tiny",
        arguments: tuple[str, ...] = (),
        start_timeout_s: float = START_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._arguments = arguments
        self._start_timeout_s = start_timeout_s
        self._environment = dict(environment or {})
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._stderr: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunningServer:
        # Short: the path of a Unix socket may have about 100 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="bilm-")
        target = f"unix:{self._folder.name}/bilm.sock"
        self._stderr = (Path(self._folder.name) / "stderr").open("w+b")  # a pipe that nobody reads would fill up
        flags = ["--model", self._model, "--listen", target, "--drain-delay-s", "0"]  # no balancer to wait for
        command = [sys.executable, "-m", "bilm_server", *flags, *self._arguments]
        environment = {**os.environ, **self._environment}
        self._process = subprocess.Popen(  # noqa: S603 - our own
            command, stderr=self._stderr, stdout=self._stderr, env=environment
        )
        try:
            wait_until_serving(target, self._process, self._start_timeout_s)
        except BaseException as error:
            written = self._stop()
            if isinstance(error, ServerStartError):
                raise ServerStartError(f"{error}\n{written}") from error
            raise
        return RunningServer(target, self._process.pid)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> str:
        """Stop the server by SIGTERM; what it wrote."""
        assert self._process is not None and self._stderr is not None and self._folder is not None  # noqa: S101, PT018
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._stderr.seek(0)
            written = self._stderr.read().decode(errors="replace")
            self._stderr.close()
            self._folder.cleanup()
        return written


def wait_until_serving(target: str, process: "subprocess.Popen[Any]", timeout_s: float) -> None:
    """Watch the server's health until it is SERVING.

    Raises:
        ServerStartError: The process exited, or `timeout_s` seconds passed.
    """
    end_s = time.monotonic() + timeout_s
    with new_channel(target, _RECONNECT_FAST) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while (left_s := end_s - time.monotonic()) > 0:
            if _is_serving(stub, min(left_s, _LOOK_INTERVAL_S)):
                return
            if process.poll() is not None:
                raise ServerStartError(f"the server exited with code {process.returncode} before it was ready:")
    raise ServerStartError(f"the server was not ready after {timeout_s} s:")


def _is_serving(stub: Any, timeout_s: float) -> bool:
    """Return whether the server is or becomes SERVING in `timeout_s` seconds; returns early only if it does."""
    try:
        for response in stub.Watch(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return True
    except grpc.RpcError as error:
        if error.code() not in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}:
            raise
    return False
