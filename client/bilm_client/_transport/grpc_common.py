"""What both of gRPC's APIs share: the arguments of a call and the translation of a health check."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from bilm_client._core.settings import Deadline, Settings
from bilm_client.errors import ServiceError
from bilm_client.results import HealthStatus


def call_arguments(settings: Settings, deadline: Deadline) -> dict[str, Any]:
    """Return time-out and metadata of a call.

    Raises:
        DeadlineError: No time is left.
    """
    return {"timeout": deadline.remaining_s(), "metadata": settings.call_metadata()}


def health_status(response: health_pb2.HealthCheckResponse) -> HealthStatus:
    """Return the status of a response."""
    return HealthStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def failed_health_status(error: ServiceError) -> HealthStatus:
    """Return the status that an error stands for.

    Raises:
        ServiceError: `error`, where it stands for none.
    """
    if error.code is grpc.StatusCode.NOT_FOUND:
        return HealthStatus.SERVICE_UNKNOWN
    raise error
