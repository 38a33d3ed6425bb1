"""Names of calls over HTTP, in access log, metrics and traces. Never renamed."""

from typing import Final

EMBEDDINGS: Final = "http/embeddings"
EMBED: Final = "http/embed"
MODELS: Final = "http/models"
METRICS: Final = "http/metrics"
OPENAPI: Final = "http/openapi"
INFER_METHODS: Final = (EMBEDDINGS, EMBED)
"""Those that embed."""
