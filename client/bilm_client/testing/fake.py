"""Clients without a server. Everything but the network is the real client's: arguments, results, errors."""

from collections.abc import Mapping
from functools import partial

from bilm_client._core.settings import Settings
from bilm_client.aio import AsyncClient, AsyncTransportClient
from bilm_client.client import Client, TransportClient
from bilm_client.results import HealthStatus
from bilm_client.testing.transport import FakeAsyncTransport, FakeTransport

_SETTINGS = Settings(target="fake")


class FakeClient(Client):
    """A `Client` without a server: the same surface, deterministic vectors.

    Args:
        layer_count: Layers, the token layer included.
        width: Components of a vector.
        failures: Reason by sentence (the text, or the tokens joined by spaces) that shall fail.
        health: What `health` returns.
    """

    def __init__(
        self,
        *,
        layer_count: int = 3,
        width: int = 16,
        failures: Mapping[str, str] | None = None,
        health: HealthStatus = HealthStatus.SERVING,
    ) -> None:
        new_transport = partial(FakeTransport, layer_count, width, dict(failures or {}), health)
        TransportClient.__init__(self, _SETTINGS, new_transport)


class FakeAsyncClient(AsyncClient):
    """An `AsyncClient` without a server; see `FakeClient`.

    Args:
        layer_count: Layers, the token layer included.
        width: Components of a vector.
        failures: Reason by sentence (the text, or the tokens joined by spaces) that shall fail.
        health: What `health` returns.
    """

    def __init__(
        self,
        *,
        layer_count: int = 3,
        width: int = 16,
        failures: Mapping[str, str] | None = None,
        health: HealthStatus = HealthStatus.SERVING,
    ) -> None:
        new_transport = partial(FakeAsyncTransport, layer_count, width, dict(failures or {}), health)
        AsyncTransportClient.__init__(self, _SETTINGS, new_transport)
