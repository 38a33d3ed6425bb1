"""From results to output tensors: the sentences of a call one behind another, ragged where they aren't pooled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, cast

import numpy as np
from bilm_api.constants import Reason
from bilm_api.inference import open_inference_pb2 as pb
from bilm_model.engine.types import DataType

from bilm_server.errors import RefusalError
from bilm_server.inference.types import Outcome, Result, Sentence
from bilm_server.protocols.kserve.parameters import check_names
from bilm_server.served_model import EmbeddingModel

EMBEDDINGS, LENGTHS, TOKENS, STARTS, ENDS = "embeddings", "lengths", "tokens", "token_starts", "token_ends"
_NAMES: Final = (EMBEDDINGS, LENGTHS, TOKENS, STARTS, ENDS)
_DATATYPES: Final[Mapping[DataType, str]] = {"float32": "FP32", "float16": "FP16"}

# Generous bounds of what stands in a response once (names, shapes, parameters), and of what each token takes
_FRAME_BYTES, _TOKEN_BYTES = 1024, 4


def parse_outputs(requested: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor], *, text: bool) -> list[str]:
    """Return the names of the outputs that a request asks for; none: those of its pooling.

    Args:
        requested: of the request.
        text: whether its inputs are texts.

    Raises:
        RefusalError: MALFORMED_REQUEST.
    """
    names = [output.name for output in requested]
    check_names("outputs", names, _NAMES)
    if len(set(names)) < len(names):
        raise RefusalError(Reason.MALFORMED_REQUEST, f"outputs: expected each name once, found {', '.join(names)}")
    if not text and not {STARTS, ENDS}.isdisjoint(names):
        raise RefusalError(Reason.MALFORMED_REQUEST, f"outputs: {STARTS} and {ENDS} need the input text, found tokens")
    for output in requested:  # as for inputs, KServe's client sends what its HTTP needs
        check_names(f"{output.name}: parameters", output.parameters, ("binary_data",))
    return names


@dataclass(frozen=True)
class TensorFormat:
    """How results become tensors (`ResponseFormat`).

    Attributes:
        model: that computes them.
        request_id: the caller's name of the call.
        names: of the outputs; none: embeddings and, where they are ragged, lengths.
        n_sentences: of the call.
    """

    model: EmbeddingModel
    request_id: str
    names: Sequence[str]
    n_sentences: int

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return an upper bound of what a sentence takes beside its vectors, with its part of what is there once."""
        frame = -(-(_FRAME_BYTES + 4 * len(self.request_id)) // self.n_sentences)
        n_tokens = len(sentence.tokens)
        tokens = sum([_TOKEN_BYTES + 4 * len(token) for token in sentence.tokens]) if TOKENS in self.names else 0
        places = _TOKEN_BYTES * n_tokens * len({STARTS, ENDS} & set(self.names))
        return frame + _TOKEN_BYTES + tokens + places

    def build(self, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> bytes:
        """Return the response, serialised; no result is a refusal, since a tensor has no place for one."""
        computed = cast("Sequence[Result]", results)
        response = pb.ModelInferResponse(model_name=self.model.name, model_version=self.model.version)
        response.id = self.request_id
        _fill_cost(response, sentences, computed)
        pooled = sentences[0].output.pooled
        for name in self.names or ((EMBEDDINGS,) if pooled else (EMBEDDINGS, LENGTHS)):
            if name == EMBEDDINGS:
                _add_embeddings(response, sentences, computed)
            elif name == TOKENS:
                _add_tokens(response, sentences)
            else:
                _add(response, name, "INT32", *_int32s(_numbers(name, sentences)))
        data: bytes = response.SerializeToString()
        return data


def metadata(model: EmbeddingModel) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    """Return what a model's outputs are without parameters."""
    shape = [-1, model.layer_count, model.width]
    tensors = {EMBEDDINGS: ("FP32", shape), TOKENS: ("BYTES", [-1])}
    others = ("INT32", [-1])
    return [
        pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=axes)
        for name in _NAMES
        for datatype, axes in [tensors.get(name, others)]
    ]


def _add(response: pb.ModelInferResponse, name: str, datatype: str, shape: Sequence[int], data: bytes) -> None:
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    response.raw_output_contents.append(data)


def _add_embeddings(response: pb.ModelInferResponse, sentences: Sequence[Sentence], results: Sequence[Result]) -> None:
    """Add [sentences, (layers,) width] or, ragged, [tokens of all sentences, (layers,) width]."""
    output = sentences[0].output
    vectors = [result.vectors for result in results]
    if output.pooled:
        shape = (len(vectors), *vectors[0].shape)
    else:
        # A sentence's layers are its first axis, and sentences go one behind another along the axis of tokens
        vectors = [each if each.ndim == 2 else each.swapaxes(0, 1) for each in vectors]
        shape = (sum([len(each) for each in vectors]), *vectors[0].shape[1:])
    data = b"".join([np.ascontiguousarray(each).data for each in vectors])
    _add(response, EMBEDDINGS, _DATATYPES[output.data_type], shape, data)


def _add_tokens(response: pb.ModelInferResponse, sentences: Sequence[Sentence]) -> None:
    encoded = [token.encode() for sentence in sentences for token in sentence.tokens]
    data = b"".join(chain.from_iterable((len(token).to_bytes(_TOKEN_BYTES, "little"), token) for token in encoded))
    _add(response, TOKENS, "BYTES", [len(encoded)], data)


def _numbers(name: str, sentences: Sequence[Sentence]) -> list[int]:
    if name == LENGTHS:
        return [len(sentence.tokens) for sentence in sentences]
    places = [sentence.starts if name == STARTS else sentence.ends for sentence in sentences]
    return list(chain.from_iterable(places))


def _int32s(numbers: Sequence[int]) -> tuple[Sequence[int], bytes]:
    return [len(numbers)], np.array(numbers, "<i4").tobytes()


def _fill_cost(response: pb.ModelInferResponse, sentences: Sequence[Sentence], results: Iterable[Result]) -> None:
    """Say what the call cost, and what was cut: as `Usage` does in an `Embed`."""
    times = [(result.queue_s, result.inference_s) for result in results]
    cost = {
        "tokens": sum([len(sentence.tokens) for sentence in sentences]),
        "truncated_sentences": sum([sentence.truncated for sentence in sentences]),
        "queue_us": round(1e6 * max([queue_s for queue_s, _ in times])),
        "inference_us": round(1e6 * max([inference_s for _, inference_s in times])),
    }
    for name, value in cost.items():
        response.parameters[name].int64_param = value
