"""Clients without a server. Everything but the network is the real client's: arguments, results, errors."""

from collections.abc import Mapping, Sequence
from functools import partial

from bilm_client._core.settings import Settings
from bilm_client.aio import AsyncClient, AsyncTransportClient
from bilm_client.client import Client, TransportClient
from bilm_client.results import HealthStatus
from bilm_client.testing.models import FakeModel
from bilm_client.testing.transport import FakeAsyncTransport, FakeTransport

_TARGET = "fake"


class FakeClient(Client):
    """A `Client` without a server: the same surface, deterministic vectors.

    Args:
        layer_count: Layers of the only model, the token layer included.
        width: Components of its vectors.
        models: Several models instead of one, the default one first; see `FakeModel`.
        model: The one that this client names, as a `Client` does; "": the default one.
        expected_model_version: As for a `Client`.
        failures: Reason by sentence (the text, or the tokens joined by spaces) that shall fail.
        health: What `health` returns, of the server and of each model.
    """

    def __init__(
        self,
        *,
        layer_count: int = 3,
        width: int = 16,
        models: Sequence[FakeModel] = (),
        model: str = "",
        expected_model_version: str = "",
        failures: Mapping[str, str] | None = None,
        health: HealthStatus = HealthStatus.SERVING,
    ) -> None:
        served = models or (FakeModel(layer_count=layer_count, width=width),)
        settings = Settings(target=_TARGET, model=model, expected_model_version=expected_model_version)
        TransportClient.__init__(self, settings, partial(FakeTransport, served, dict(failures or {}), health))


class FakeAsyncClient(AsyncClient):
    """An `AsyncClient` without a server; arguments are those of `FakeClient`."""

    def __init__(
        self,
        *,
        layer_count: int = 3,
        width: int = 16,
        models: Sequence[FakeModel] = (),
        model: str = "",
        expected_model_version: str = "",
        failures: Mapping[str, str] | None = None,
        health: HealthStatus = HealthStatus.SERVING,
    ) -> None:
        served = models or (FakeModel(layer_count=layer_count, width=width),)
        settings = Settings(target=_TARGET, model=model, expected_model_version=expected_model_version)
        AsyncTransportClient.__init__(self, settings, partial(FakeAsyncTransport, served, dict(failures or {}), health))
