"""`bilm_api.v1.EmbedService`: messages in, messages out; what is between is the `Embedder`'s."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import MAX_REQUEST_BYTES, Feature
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_model.alphabet import MAX_TOKEN_BYTES

import bilm_server
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.registry import Registry
from bilm_server.observability.call_record import current_call
from bilm_server.protocols.embed_v1.requests import new_sentence, parse_options, parse_priority
from bilm_server.protocols.embed_v1.responses import WireFormat
from bilm_server.protocols.embed_v1.stream import StreamHandler
from bilm_server.protocols.grpc.handlers import new_call

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class EmbedService(embed_pb2_grpc.EmbedServiceServicer):
    """The RPC methods."""

    def __init__(self, models: Registry, stream_stall_s: float) -> None:
        """Set the parts.

        Args:
            models: what embeds.
            stream_stall_s: seconds that a stream's client may take to read a message.
        """
        self._models, self._stream_stall_s = models, stream_stall_s

    async def Embed(  # type: ignore[override] # noqa: N802 - the contract's name; bytes, see CallInterceptor
        self, request: embed_pb2.EmbedRequest, context: "Context"
    ) -> bytes:
        """Embed all sentences of a request; the response comes serialised already."""
        embedder = self._models.find(request.model, request.expected_model_version)
        embedder.limits.check_count(len(request.sentences))
        output, call = parse_options(request.options, embedder.model), new_call(context)
        embedder.prioritise(call, parse_priority(request.priority))
        sentences = [new_sentence(sentence, output, call) for sentence in request.sentences]
        wire = WireFormat(embedder.model, request.options.omit_tokens)
        return await embedder.embed(sentences, current_call().request_bytes, wire)

    async def EmbedStream(  # type: ignore[override] # noqa: N802 - grpc.aio also takes a coroutine that writes
        self, request_iterator: AsyncIterator[embed_pb2.EmbedStreamRequest], context: "Context"
    ) -> None:
        """Embed sentences as they come."""
        # By itself: were it to go with the first message, a status behind a message that nobody reads could not be sent
        await context.send_initial_metadata(())
        handler = StreamHandler(self._models, new_call(context), context.write, self._stream_stall_s)
        await handler.run(request_iterator)

    async def GetModel(  # noqa: N802 - the contract's name
        self, request: embed_pb2.GetModelRequest, context: "Context"
    ) -> embed_pb2.GetModelResponse:
        """Return what a model is, and within which limits it serves."""
        return _description(self._models.find(request.model, request.expected_model_version))

    async def ListModels(  # noqa: N802 - the contract's name
        self, request: embed_pb2.ListModelsRequest, context: "Context"
    ) -> embed_pb2.ListModelsResponse:
        """Return what each model is, the default one first."""
        default, *others = self._models
        others.sort(key=lambda embedder: embedder.model.name)
        return embed_pb2.ListModelsResponse(models=map(_description, (default, *others)))


def _description(embedder: Embedder) -> embed_pb2.GetModelResponse:
    model, limits = embedder.model, embedder.limits
    return embed_pb2.GetModelResponse(
        name=model.name,
        version=model.version,
        layer_count=model.layer_count,
        width=model.width,
        cell_size=model.cell_size,
        parameter_count=model.parameter_count,
        precision=model.precision,
        backend=model.backend,
        tokenizer=model.tokenizer.name,
        max_token_bytes=MAX_TOKEN_BYTES,
        state_bytes=model.state_bytes,
        limits=embed_pb2.Limits(
            max_sentences_per_request=limits.sentences,
            max_tokens_per_request=limits.tokens,
            max_tokens_per_sentence=limits.sentence_tokens,
            max_request_bytes=MAX_REQUEST_BYTES,
            max_response_bytes=limits.response_bytes,
            max_stream_items_in_flight=limits.stream_items,
        ),
        server_version=bilm_server.__version__,
        inputs=model.inputs,
        contexts=model.contexts,
        features=Feature,
        members=model.members,
    )
