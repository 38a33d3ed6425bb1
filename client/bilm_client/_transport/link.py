"""What a synchronous client has in one process: a channel, and whether it is closed."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2_grpc
from grpc_health.v1 import health_pb2_grpc

from bilm_client.errors import ClientClosedError


class Link:
    """The channel of one client in one process.

    Args:
        new_channel: Makes the channel, which is not connected yet.
        closed: Whether the client was closed before this process was forked.
    """

    def __init__(self, new_channel: Callable[[], grpc.Channel], closed: bool) -> None:
        self._new_channel = new_channel
        self._lock = threading.RLock()  # a signal handler may close the client
        self._closed = threading.Event()
        self._stubs: _Stubs | None = None
        if closed:
            self._closed.set()

    @property
    def is_closed(self) -> bool:
        """Whether the client was closed here, or before the fork."""
        return self._closed.is_set()

    def check_open(self) -> None:
        """Let no closed client be used.

        Raises:
            ClientClosedError: The client is closed.
        """
        if self.is_closed:
            raise ClientClosedError("the client is closed")

    def stub(self) -> embed_pb2_grpc.EmbedServiceStub:
        """Return the service's stub, on the channel that the first call makes.

        Raises:
            ClientClosedError: The client is closed.
        """
        return self._open().embed

    def health_stub(self) -> Any:
        """Return the health service's stub, on the same channel.

        Raises:
            ClientClosedError: The client is closed.
        """
        return self._open().health

    def _open(self) -> "_Stubs":
        with self._lock:
            self.check_open()
            stubs = self._stubs
            if stubs is None:
                stubs = self._stubs = _Stubs(self._new_channel())
                if self.is_closed:  # by a signal handler, while the channel was being made
                    self.close()
                    self.check_open()
            return stubs

    def close(self) -> None:
        """Close the channel for good."""
        with self._lock:
            self._closed.set()
            stubs, self._stubs = self._stubs, None
        if stubs is not None:
            stubs.channel.close()

    def wait(self, timeout_s: float) -> None:
        """Wait so long, or until the client is closed."""
        self._closed.wait(timeout_s)


class _Stubs:
    """A channel with all its stubs, made before anything can close it: gRPC (1.85) crashes making one afterwards."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.embed = embed_pb2_grpc.EmbedServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)  # gRPC's package has no types for it
