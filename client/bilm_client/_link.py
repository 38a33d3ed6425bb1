"""What a synchronous client has in one process: a channel, and whether it is closed."""

import threading

import grpc
from bilm_api.v1 import embed_pb2_grpc

from bilm_client._settings import Settings
from bilm_client.errors import ClientClosedError


class Link:
    """The channel of one client in one process.

    Args:
        settings: The client's.
        closed: Whether the client was closed before this process was forked.
    """

    def __init__(self, settings: Settings, closed: bool) -> None:
        self._settings = settings
        self._lock = threading.RLock()  # a signal handler may close the client
        self._closed = threading.Event()
        self._channel: grpc.Channel | None = None
        self._stub: embed_pb2_grpc.EmbedServiceStub | None = None
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

    def channel(self) -> grpc.Channel:
        """The channel, made by the first call.

        Raises:
            ClientClosedError: The client is closed.
        """
        with self._lock:
            self.check_open()
            if self._channel is None:
                self._channel = self._settings.new_channel()
            return self._channel

    def stub(self) -> embed_pb2_grpc.EmbedServiceStub:
        """The service's stub on that channel.

        Raises:
            ClientClosedError: The client is closed.
        """
        with self._lock:
            channel = self.channel()
            if self._stub is None:
                self._stub = embed_pb2_grpc.EmbedServiceStub(channel)
            return self._stub

    def close(self) -> None:
        """Close the channel for good."""
        with self._lock:
            self._closed.set()
            channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            channel.close()

    def wait(self, timeout_s: float) -> None:
        """Wait so long, or until the client is closed."""
        self._closed.wait(timeout_s)
