"""The endpoints of loaded models, by the names of their routes."""

from collections.abc import Mapping

from bilm_server.embedding.registry import Registry
from bilm_server.protocols.http import names
from bilm_server.protocols.http.embed import Embed
from bilm_server.protocols.http.embeddings import Embeddings
from bilm_server.protocols.http.models import Models
from bilm_server.protocols.http.routing import Endpoint


def endpoints_of(models: Registry) -> Mapping[str, Endpoint]:
    """Return what answers the calls that need a model."""
    return {
        names.EMBEDDINGS: Embeddings(models),
        names.EMBED: Embed(models),
        names.MODELS: Models(models),
    }
