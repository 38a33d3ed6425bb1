"""How the load generator calls a server: grpc.aio, requests made beforehand, answers parsed.

Each contestant's caller stands in a module of its own, for their packages can't all be had in one environment.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CONNECTIONS = 8
"""Of a caller, used in turn: as many callers would have them. On one, a server refuses calls beyond some hundred."""
CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # contestants run on this machine
]

Sentences = Sequence[Sequence[str]]


class CallFailedError(Exception):
    """The server refused, or a sentence failed."""


class LoadCaller(Protocol):
    """Connections to one server."""

    def prepare(self, sentences: Sentences) -> Any:
        """Return the request that embeds these sentences; made beforehand, so that its cost isn't the server's."""
        ...

    async def call(self, request: Any) -> NDArray[np.float32]:
        """Send a request and return the first sentence's vectors, flat. Raises CallFailedError."""
        ...

    async def close(self) -> None:
        """End the connections."""
        ...
