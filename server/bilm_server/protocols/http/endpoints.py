"""The endpoints of a loaded model, by the names of their routes."""

from collections.abc import Mapping

from bilm_server.embedding.embedder import Embedder
from bilm_server.protocols.http import names
from bilm_server.protocols.http.embed import Embed
from bilm_server.protocols.http.embeddings import Embeddings
from bilm_server.protocols.http.models import Models
from bilm_server.protocols.http.routing import Endpoint


def endpoints_of(embedder: Embedder) -> Mapping[str, Endpoint]:
    """Return what answers the calls that need a model."""
    return {
        names.EMBEDDINGS: Embeddings(embedder),
        names.EMBED: Embed(embedder),
        names.MODELS: Models(embedder),
    }
