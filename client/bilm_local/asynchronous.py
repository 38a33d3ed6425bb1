"""A `LocalTransport` for asynchronous clients."""

import asyncio

from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.settings import Deadline, Settings, deadline_passed
from bilm_client._transport.base import Deliver
from bilm_client.results import HealthStatus

from bilm_local.streams import LocalStream
from bilm_local.transport import LocalTransport


class LocalAsyncTransport:
    """An `AsyncTransport` over a `LocalTransport`, which several may share and its owner closes."""

    def __init__(self, transport: LocalTransport, _settings: Settings) -> None:
        self._transport = transport

    def check_open(self) -> None:
        """Raise as `LocalTransport.check_open`."""
        self._transport.check_open()

    async def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        """Answer an Embed; tokenising and the response's message are made in other threads."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        pending = await asyncio.to_thread(self._transport.start_embed, request, deadline)
        try:
            pending.when_done(lambda: loop.call_soon_threadsafe(done.set))
            async with asyncio.timeout(deadline.remaining_s()):
                await done.wait()
        except BaseException as error:
            pending.cancel()
            if isinstance(error, TimeoutError):
                raise deadline_passed() from None
            raise
        return await asyncio.to_thread(pending.result)

    async def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse:
        """Return what the model is."""
        return await asyncio.to_thread(self._transport.get_model, request, deadline)

    async def list_models(self, deadline: Deadline) -> pb.ListModelsResponse:
        """Return the one model."""
        return await asyncio.to_thread(self._transport.list_models, deadline)

    async def check_health(self, service: str, deadline: Deadline) -> HealthStatus:
        """Return whether the model is there."""
        return await asyncio.to_thread(self._transport.check_health, service, deadline)

    def open_stream(self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, deadline: Deadline) -> LocalStream:
        """Open a stream; the model is loaded before, or the event loop waits for it."""
        return self._transport.open_stream(opening, deliver, deadline)

    async def wait(self, timeout_s: float) -> None:
        """Wait."""
        await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        """Leave the model to its owner."""
