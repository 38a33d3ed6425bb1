"""`inference.GRPCInferenceService`: tensors in, tensors out; what is between is the `Embedder`'s."""

from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.inference import open_inference_pb2 as pb
from bilm_model.alphabet import MAX_TOKEN_BYTES

import bilm_server
from bilm_server.embedding.conversions import request_weight
from bilm_server.embedding.registry import Registry
from bilm_server.inference.types import Sentence
from bilm_server.observability.call_record import current_call
from bilm_server.protocols.grpc.handlers import new_call
from bilm_server.protocols.kserve import inputs, outputs
from bilm_server.protocols.kserve.parameters import parse_parameters

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

_PLATFORM = "bilm-serve"


class InferenceService:
    """The methods that need the model; the others are in `readiness`."""

    def __init__(self, models: Registry) -> None:
        """Set what embeds."""
        self._models = models

    async def ServerMetadata(  # noqa: N802 - the protocol's name
        self, request: pb.ServerMetadataRequest, context: "Context"
    ) -> pb.ServerMetadataResponse:
        """Return the software's name."""
        return pb.ServerMetadataResponse(name=_PLATFORM, version=bilm_server.__version__)

    async def ModelMetadata(  # noqa: N802 - the protocol's name
        self, request: pb.ModelMetadataRequest, context: "Context"
    ) -> pb.ModelMetadataResponse:
        """Describe a model's tensors, with what `GetModel` says of it among the properties."""
        embedder = self._models.find(request.name, request.version)
        model, limits = embedder.model, embedder.limits
        properties = {
            "layer_count": model.layer_count,
            "width": model.width,
            "precision": model.precision,
            "backend": model.backend,
            "tokenizer": model.tokenizer.name,
            "max_token_bytes": MAX_TOKEN_BYTES,
            "max_sentences_per_request": limits.sentences,
            "max_tokens_per_request": limits.tokens,
            "max_tokens_per_sentence": limits.sentence_tokens,
            "max_response_bytes": limits.response_bytes,
        }
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[model.version],
            platform=_PLATFORM,
            inputs=inputs.metadata(),
            outputs=outputs.metadata(model),
            properties={name: str(value) for name, value in properties.items()},
        )

    async def ModelInfer(  # noqa: N802 - the protocol's name; bytes, see CallInterceptor
        self, request: pb.ModelInferRequest, context: "Context"
    ) -> bytes:
        """Embed a batch; the response comes serialised already."""
        embedder = self._models.find(request.model_name, request.model_version)
        parameters = parse_parameters(request.parameters, embedder.model)
        call = new_call(context, parameters.timeout_s)
        embedder.prioritise(call, parameters.priority)
        n_bytes = current_call().request_bytes
        contents = await embedder.conversions.request(
            request_weight(n_bytes, 0), lambda: inputs.parse_inputs(request, embedder.limits), call.priority
        )
        names = outputs.parse_outputs(request.outputs, text=isinstance(contents[0], str))
        sentences = [Sentence(call, content, parameters.output) for content in contents]
        response = outputs.TensorFormat(embedder.model, request.id, names, len(sentences))
        return await embedder.embed(sentences, n_bytes, response, fail_as_one=True)
