"""What a client needs of the wire. gRPC's two APIs and the fakes implement it.

Every method raises the package's own errors: a transport translates those of its library.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.settings import Deadline
from bilm_client.errors import BilmError
from bilm_client.results import HealthStatus


class Interruption:
    """Delivered where a connection was ended on purpose: the stream continues with another one."""


Delivery = pb.EmbedStreamResponse | BilmError | Interruption
Deliver = Callable[[Delivery], None]
StreamOpener = Callable[[list[pb.EmbedStreamRequest], Deliver, Deadline], "StreamConnection"]


class StreamConnection(Protocol):
    """One EmbedStream call. Finalisers close it too, in any thread: no method waits."""

    def send(self, request: pb.EmbedStreamRequest) -> None: ...
    def half_close(self) -> None: ...
    def close(self) -> None: ...


class PendingEmbed(Protocol):
    """An Embed call under way. `when_done` calls back once, in any thread, when `result` has no longer to wait."""

    def result(self) -> pb.EmbedResponse: ...
    def when_done(self, callback: Callable[[], None]) -> None: ...
    def cancel(self) -> None: ...


class SyncTransport(Protocol):
    """The wire of a `Client`.

    `embed` waits for its response, which is cheapest where nothing else is to be done meanwhile; `start_embed` doesn't.
    `calls` is held while calls of either are under way, so that no fork happens then. A stream delivers each response
    and, last, the error that ended it (its proper end is one too), in any thread; `wait` ends early on `close`.
    """

    def check_open(self) -> None: ...
    def calls(self) -> AbstractContextManager[None]: ...
    def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse: ...
    def start_embed(self, request: pb.EmbedRequest, deadline: Deadline) -> PendingEmbed: ...
    def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse: ...
    def check_health(self, service: str, deadline: Deadline) -> HealthStatus: ...
    def open_stream(
        self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, deadline: Deadline
    ) -> StreamConnection: ...
    def wait(self, timeout_s: float) -> None: ...
    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The wire of an `AsyncClient`; streams are those of `SyncTransport`."""

    def check_open(self) -> None: ...
    async def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse: ...
    async def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse: ...
    async def check_health(self, service: str, deadline: Deadline) -> HealthStatus: ...
    def open_stream(
        self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, deadline: Deadline
    ) -> StreamConnection: ...
    async def wait(self, timeout_s: float) -> None: ...
    async def close(self) -> None: ...
