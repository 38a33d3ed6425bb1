"""/metrics: what `--metrics-listen` offers, behind the tokens and limits of a call."""

import asyncio

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from bilm_server.protocols.http.messages import HttpRequest, HttpResponse


class MetricsPage:
    """The endpoint; it needs no model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Set what is offered."""
        self._registry = registry

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Return the metrics in the format that the request accepts; collected in a thread."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return HttpResponse(await asyncio.to_thread(encode, self._registry), content_type=content_type)
