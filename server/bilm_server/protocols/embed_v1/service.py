"""`bilm_api.v1.EmbedService`: messages in, messages out; what is between is the `Embedder`'s."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import MAX_REQUEST_BYTES, Feature
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_model.alphabet import MAX_TOKEN_BYTES

import bilm_server
from bilm_server.embedding.embedder import Embedder
from bilm_server.observability.call_record import current_call
from bilm_server.protocols.embed_v1.requests import new_sentence, parse_options, parse_priority
from bilm_server.protocols.embed_v1.responses import WireFormat
from bilm_server.protocols.embed_v1.stream import StreamHandler
from bilm_server.protocols.grpc.handlers import new_call

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class EmbedService(embed_pb2_grpc.EmbedServiceServicer):
    """The RPC methods."""

    def __init__(self, embedder: Embedder, stream_stall_s: float) -> None:
        """Set the parts.

        Args:
            embedder: what embeds.
            stream_stall_s: seconds that a stream's client may take to read a message.
        """
        self._embedder, self._stream_stall_s = embedder, stream_stall_s
        self._wires = {omit: WireFormat(embedder.model, omit) for omit in (False, True)}

    async def Embed(  # type: ignore[override] # noqa: N802 - the contract's name; bytes, see CallInterceptor
        self, request: embed_pb2.EmbedRequest, context: "Context"
    ) -> bytes:
        """Embed all sentences of a request; the response comes serialised already."""
        embedder = self._embedder
        embedder.check_model(request.model, request.expected_model_version)
        embedder.limits.check_count(len(request.sentences))
        output, call = parse_options(request.options, embedder.model), new_call(context)
        embedder.prioritise(call, parse_priority(request.priority))
        sentences = [new_sentence(sentence, output, call) for sentence in request.sentences]
        return await embedder.embed(sentences, current_call().request_bytes, self._wires[request.options.omit_tokens])

    async def EmbedStream(  # type: ignore[override] # noqa: N802 - grpc.aio also takes a coroutine that writes
        self, request_iterator: AsyncIterator[embed_pb2.EmbedStreamRequest], context: "Context"
    ) -> None:
        """Embed sentences as they come."""
        # By itself: were it to go with the first message, a status behind a message that nobody reads could not be sent
        await context.send_initial_metadata(())
        handler = StreamHandler(self._embedder, new_call(context), context.write, self._stream_stall_s)
        await handler.run(request_iterator)

    async def GetModel(  # noqa: N802 - the contract's name
        self, request: embed_pb2.GetModelRequest, context: "Context"
    ) -> embed_pb2.GetModelResponse:
        """Return what is served, and within which limits."""
        self._embedder.check_model(request.model, request.expected_model_version)
        return self._description()

    async def ListModels(  # noqa: N802 - the contract's name
        self, request: embed_pb2.ListModelsRequest, context: "Context"
    ) -> embed_pb2.ListModelsResponse:
        """Return the same of every model."""
        self._embedder.check_model("", "")
        return embed_pb2.ListModelsResponse(models=[self._description()])

    def _description(self) -> embed_pb2.GetModelResponse:
        model, limits = self._embedder.model, self._embedder.limits
        return embed_pb2.GetModelResponse(
            name=model.name,
            version=model.version,
            layer_count=model.config.layer_count,
            width=model.config.width,
            cell_size=model.config.cell_dim,
            parameter_count=model.parameter_count,
            precision=model.precision,
            backend=model.engine.description.backend,
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
            inputs="char_cnn",
            contexts="lstm",
            features=Feature,
        )
