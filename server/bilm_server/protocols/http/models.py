"""/v1/models as OpenAI's clients call it, with what `GetModel` returns beside."""

import time

import orjson
from bilm_api.constants import MAX_REQUEST_BYTES
from bilm_model.alphabet import MAX_TOKEN_BYTES

import bilm_server
from bilm_server.embedding.embedder import Embedder
from bilm_server.protocols.http.messages import HttpRequest, HttpResponse


class Models:
    """The endpoint: the list of models, or one of them by name."""

    def __init__(self, embedder: Embedder) -> None:
        """Set what is described; the model counts as created now."""
        self._embedder, self._created = embedder, int(time.time())

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Return the list, or the model that the path names."""
        self._embedder.check_model(request.tail, "")
        model = self._description()
        return HttpResponse(orjson.dumps(model if request.tail else {"object": "list", "data": [model]}))

    def _description(self) -> dict[str, object]:
        model, limits = self._embedder.model, self._embedder.limits
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "bilm-serve",
            "version": model.version,
            "layer_count": model.config.layer_count,
            "width": model.config.width,
            "cell_size": model.config.cell_dim,
            "parameter_count": model.parameter_count,
            "precision": model.precision,
            "backend": model.engine.description.backend,
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
