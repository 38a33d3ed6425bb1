"""What the Open Inference Protocol tells everybody: whether the process lives, and whether calls would be computed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.inference import open_inference_pb2 as pb

from bilm_server.protocols.grpc.health import HealthReporter

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class ReadinessService:
    """The three methods that need no model; they follow the standard health service."""

    def __init__(self, health: HealthReporter, has_model: Callable[[str, str], bool]) -> None:
        """Keep what is reported.

        Args:
            health: of the server.
            has_model: returns whether a model of this name and version is loaded; "" means any.
        """
        self._health, self._has_model = health, has_model

    async def ServerLive(  # noqa: N802 - the protocol's name
        self, request: pb.ServerLiveRequest, context: "Context"
    ) -> pb.ServerLiveResponse:
        """Say that the process works."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802 - the protocol's name
        self, request: pb.ServerReadyRequest, context: "Context"
    ) -> pb.ServerReadyResponse:
        """Say whether the server is SERVING."""
        return pb.ServerReadyResponse(ready=self._health.serving)

    async def ModelReady(  # noqa: N802 - the protocol's name
        self, request: pb.ModelReadyRequest, context: "Context"
    ) -> pb.ModelReadyResponse:
        """Say whether this model is SERVING."""
        ready = self._health.is_ready(request.name) and self._has_model(request.name, request.version)
        return pb.ModelReadyResponse(ready=ready)
