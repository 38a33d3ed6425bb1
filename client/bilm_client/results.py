"""Value objects that the client returns."""

import enum
from dataclasses import dataclass
from typing import Self

import numpy as np
from bilm_api.v1 import embed_pb2 as pb
from numpy.typing import NDArray

Vectors = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The vectors of one sentence of T tokens; of a `Chosen` that isn't pooled, of the T chosen ones.

    Attributes:
        tokens: The T tokens as they were embedded.
        vectors: (layers, T, width) for layers="all", (T, width) for one layer or a mix; without the T axis where
            pooled, with one of spans in its place where spans are chosen. float16 where that was asked for, else
            float32. Read-only.
        truncated: Whether a token had more bytes than the model reads.
        offsets: (first byte, byte after the last) of each token in the UTF-8 of the text; None where the input was
            tokens.
        state: The model's state after the sentence, to continue from; None where it wasn't asked for.
        model_version: The version of the model that made the vectors.
    """

    tokens: tuple[str, ...]
    vectors: Vectors
    truncated: bool
    offsets: tuple[tuple[int, int], ...] | None
    state: bytes | None
    model_version: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits.

    Attributes:
        max_sentences_per_request: Sentences in one Embed.
        max_tokens_per_request: Tokens in one Embed.
        max_tokens_per_sentence: Tokens in one sentence, also on a stream.
        max_request_bytes: Bytes of one request message.
        max_response_bytes: Bytes of one response message.
        max_stream_items_in_flight: Items of a stream that the server reads ahead of their results.
    """

    max_sentences_per_request: int
    max_tokens_per_request: int
    max_tokens_per_sentence: int
    max_request_bytes: int
    max_response_bytes: int
    max_stream_items_in_flight: int

    @classmethod
    def from_proto(cls, limits: pb.Limits) -> Self:
        """Return the value object for the message."""
        return cls(
            max_sentences_per_request=limits.max_sentences_per_request,
            max_tokens_per_request=limits.max_tokens_per_request,
            max_tokens_per_sentence=limits.max_tokens_per_sentence,
            max_request_bytes=limits.max_request_bytes,
            max_response_bytes=limits.max_response_bytes,
            max_stream_items_in_flight=limits.max_stream_items_in_flight,
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a server serves.

    Attributes:
        name: Its name, as a client's `model` may give it.
        version: A hash of weights and options.
        layer_count: Layers that layers="all" returns, the token layer included.
        width: Components of a vector.
        cell_size: Size of the LSTM cells; 0 where there are none.
        parameter_count: Number of parameters.
        precision: Arithmetic of the products, "float32" or "bfloat16".
        backend: Device and implementation, for people to read.
        tokenizer: Tokenizer of raw text.
        max_token_bytes: Bytes of a token that the model reads.
        state_bytes: Bytes of a state.
        limits: The server's limits.
        server_version: Version of the server's software.
        inputs: What makes vectors of tokens, as in "char_cnn"; "" from a server that doesn't say.
        contexts: What runs over them, as in "lstm"; likewise.
        features: What the server can do that earlier ones can't.
        members: Names of an ensemble's models, in the order of their vectors.
    """

    name: str
    version: str
    layer_count: int
    width: int
    cell_size: int
    parameter_count: int
    precision: str
    backend: str
    tokenizer: str
    max_token_bytes: int
    state_bytes: int
    limits: Limits
    server_version: str
    inputs: str = ""
    contexts: str = ""
    features: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, response: pb.GetModelResponse) -> Self:
        """Return the value object for the message."""
        return cls(
            name=response.name,
            version=response.version,
            layer_count=response.layer_count,
            width=response.width,
            cell_size=response.cell_size,
            parameter_count=response.parameter_count,
            precision=response.precision,
            backend=response.backend,
            tokenizer=response.tokenizer,
            max_token_bytes=response.max_token_bytes,
            state_bytes=response.state_bytes,
            limits=Limits.from_proto(response.limits),
            server_version=response.server_version,
            inputs=response.inputs,
            contexts=response.contexts,
            features=tuple(response.features),
            members=tuple(response.members),
        )


class HealthStatus(enum.StrEnum):
    """What a server says about itself or one of its services."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"
    UNKNOWN = "UNKNOWN"
