"""Client of bilm-serve: contextual word vectors for sentences.

    from bilm_client import Client

    with Client("localhost:50051") as client:
        for embedding in client.embed(["The bank of the river.", ["Tokens", "are", "fine", "too", "."]]):
            print(embedding.tokens, embedding.vectors.shape)  # (layers, tokens, width)

`bilm_client.aio.AsyncClient` is the same with awaits, `bilm_client.errors` holds the exceptions, and
`bilm_client.testing` a fake client for the tests of those who call us.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilm_client._core.chosen import Chosen
    from bilm_client._core.inputs import Sentence
    from bilm_client._core.options import ScalarMix
    from bilm_client.aio import AsyncClient
    from bilm_client.client import Client
    from bilm_client.errors import BilmError, ClientClosedError, SentenceError, ServiceError
    from bilm_client.policy import Balance, Keepalive, RetryPolicy
    from bilm_client.results import Embedding, HealthStatus, Limits, ModelInfo

__all__ = [
    "AsyncClient",
    "Balance",
    "BilmError",
    "Chosen",
    "Client",
    "ClientClosedError",
    "Embedding",
    "HealthStatus",
    "Keepalive",
    "Limits",
    "ModelInfo",
    "RetryPolicy",
    "ScalarMix",
    "Sentence",
    "SentenceError",
    "ServiceError",
]

# Names load with their first use: `bilm-health`, which a probe starts every few seconds, needs no numpy.
_HOMES = {
    "_core.chosen": ("Chosen",),
    "_core.inputs": ("Sentence",),
    "_core.options": ("ScalarMix",),
    "aio": ("AsyncClient",),
    "client": ("Client",),
    "errors": ("BilmError", "ClientClosedError", "SentenceError", "ServiceError"),
    "policy": ("Balance", "Keepalive", "RetryPolicy"),
    "results": ("Embedding", "HealthStatus", "Limits", "ModelInfo"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
