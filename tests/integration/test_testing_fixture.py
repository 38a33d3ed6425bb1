"""The fixture that others use in their tests, used as they do."""

import numpy as np
from bilm_client import Client
from bilm_client.aio import AsyncClient
from bilm_client.results import HealthStatus
from bilm_client.testing import RunningServer
from bilm_client.testing.pytest_plugin import bilm_server

__all__ = ["bilm_server"]  # a fixture is used by its name

SENTENCES = [["The", "cat", "sat"], ["Hello"]]


def test_it_serves_the_client(bilm_server: RunningServer) -> None:
    with Client(bilm_server.target) as client:
        assert client.health() is HealthStatus.SERVING
        info = client.model_info()
        first, second = client.embed(SENTENCES)
        streamed = list(client.embed_stream(SENTENCES))
    assert info.name == "random-tiny"
    assert first.vectors.shape == (info.layer_count, 3, info.width)
    assert second.tokens == ("Hello",)
    for embedding, again in zip((first, second), streamed, strict=True):
        np.testing.assert_allclose(again.vectors, embedding.vectors, rtol=0, atol=1e-5)


async def test_it_serves_the_asynchronous_client(bilm_server: RunningServer) -> None:
    async with AsyncClient(bilm_server.target) as client:
        assert await client.health() is HealthStatus.SERVING
        first, second = await client.embed(SENTENCES)
        streamed = [embedding async for embedding in client.embed_stream(SENTENCES)]
    with Client(bilm_server.target) as client:
        expected = client.embed(SENTENCES)
    for embedding, again, same in zip((first, second), streamed, expected, strict=True):
        np.testing.assert_allclose(embedding.vectors, same.vectors, rtol=0, atol=1e-5)
        np.testing.assert_allclose(again.vectors, same.vectors, rtol=0, atol=1e-5)
