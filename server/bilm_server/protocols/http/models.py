"""/v1/models as OpenAI's clients call it, with what `GetModel` returns beside."""

import time

import orjson
from bilm_api.constants import MAX_REQUEST_BYTES
from bilm_model.alphabet import MAX_TOKEN_BYTES

import bilm_server
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.registry import Registry
from bilm_server.protocols.http.messages import HttpRequest, HttpResponse


class Models:
    """The endpoint: the list of models, or one of them by name."""

    def __init__(self, models: Registry) -> None:
        """Set what is described; all models count as created now."""
        self._models, self._created = models, int(time.time())

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Return the list, or the model that the path names."""
        if request.tail:
            return HttpResponse(orjson.dumps(self._description(self._models.find(request.tail, ""))))
        return HttpResponse(orjson.dumps({"object": "list", "data": [*map(self._description, self._models)]}))

    def _description(self, embedder: Embedder) -> dict[str, object]:
        model, limits = embedder.model, embedder.limits
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "bilm-serve",
            "version": model.version,
            "layer_count": model.layer_count,
            "width": model.width,
            "cell_size": model.cell_size,
            "parameter_count": model.parameter_count,
            "precision": model.precision,
            "backend": model.backend,
            "tokenizer": model.tokenizer.name,
            "max_token_bytes": MAX_TOKEN_BYTES,
            "state_bytes": model.state_bytes,
            "limits": {
                "max_sentences_per_request": limits.sentences,
                "max_tokens_per_request": limits.tokens,
                "max_tokens_per_sentence": limits.sentence_tokens,
                "max_request_bytes": MAX_REQUEST_BYTES,
                "max_response_bytes": limits.response_bytes,
            },
            "server_version": bilm_server.__version__,
        }
