"""Responses of /v1/embed: JSON, and raw tensors behind a JSON header."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson

from bilm_server.embedding.preprocessing import item_bytes, row_bytes
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Outcome, Result, Sentence
from bilm_server.protocols.http.encodings import Encoding, base64_bytes, extra_bytes, text_of, to_json
from bilm_server.protocols.http.messages import error_object
from bilm_server.served_model import EmbeddingModel

ALIGNMENT: Final = 64
"""The tensors begin at a multiple of so many bytes of the response."""
_LENGTH = struct.Struct("<I")

_SENTENCE_OVERHEAD_BYTES = 384  # names of fields, shape, lengths, offsets in the response; an error's fields
_TOKEN_OVERHEAD_BYTES = 32  # quotes, commas, two offsets in the text
_CHARACTER_BYTES = 6  # of a control character, escaped


@dataclass(frozen=True)
class JsonFormat:
    """A response that is JSON as a whole.

    Attributes:
        model: that computes.
        omit_tokens: whether the client knows the tokens.
        encoding: of the vectors.
    """

    model: EmbeddingModel
    omit_tokens: bool
    encoding: Encoding

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return an upper bound of what a sentence takes beside the bytes of its vectors and state."""
        output = sentence.output
        count = 1 if sentence.row_count is None else sentence.row_count
        n_bytes = count * row_bytes(output, self.model)
        n_rows = count * self.model.layer_count
        vectors = extra_bytes(self.encoding, n_bytes, item_bytes(output), n_rows)
        state = base64_bytes(self.model.state_bytes) - self.model.state_bytes if sentence.return_state else 0
        return _description_bytes(sentence, self.omit_tokens) + vectors + state

    def build(self, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> bytes:
        """Return the response."""
        parts = [b'{"results":[']
        for index, (sentence, result) in enumerate(zip(sentences, results, strict=True)):
            parts.append(b"," if index else b"")
            if isinstance(result, RefusalError):
                parts.append(orjson.dumps({"error": error_object(result)}))
                continue
            output = sentence.output
            described = orjson.dumps(_described(sentence, self.omit_tokens))[:-1]
            shape = orjson.dumps({"shape": result.vectors.shape, "data_type": output.data_type})[:-1]
            data = to_json(result.vectors, output.data_type, self.encoding)
            state = _state_bytes(self.model, sentence, result)
            end = b',"state":"%b"' % text_of(state) if state else b""
            parts.append(b'{"embedding":%b,"tensor":%b,"data":%b}%b}}' % (described, shape, data, end))
        parts.append(b'],"usage":%b}' % orjson.dumps(_usage(self.model, sentences, results)))
        return b"".join(parts)


@dataclass(frozen=True)
class RawTensors:
    """A response of raw tensors behind a header in JSON.

    First comes the header's length, 4 bytes little-endian, then the header, padded with spaces, then the tensors, one
    behind the other, then the states. The header is the JSON response with `offset` and `length` in place of data:
    bytes behind the header.

    Attributes:
        model: that computes.
        omit_tokens: whether the client knows the tokens.
    """

    model: EmbeddingModel
    omit_tokens: bool

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return an upper bound of what a sentence takes beside the bytes of its vectors and state."""
        return _description_bytes(sentence, self.omit_tokens)

    def build(self, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> bytes:
        """Return the response."""
        place = _Places()
        items: list[dict[str, Any]] = []
        for sentence, result in zip(sentences, results, strict=True):
            if isinstance(result, RefusalError):
                items.append({"error": error_object(result)})
                continue
            tensor: dict[str, Any] = {"shape": result.vectors.shape, "data_type": sentence.output.data_type}
            tensor |= place(np.ascontiguousarray(result.vectors).tobytes())
            items.append({"embedding": {**_described(sentence, self.omit_tokens), "tensor": tensor}})
        for item, sentence, result in zip(items, sentences, results, strict=True):  # behind all tensors, to align those
            if not isinstance(result, RefusalError) and (state := _state_bytes(self.model, sentence, result)):
                item["embedding"]["state"] = place(state)
        header = orjson.dumps({"results": items, "usage": _usage(self.model, sentences, results)})
        header += b" " * (-(_LENGTH.size + len(header)) % ALIGNMENT)
        return b"".join((_LENGTH.pack(len(header)), header, *place.parts))


class _Places:
    """Bytes that stand one behind the other."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._end = 0

    def __call__(self, data: bytes) -> dict[str, int]:
        """Append bytes; return where they are."""
        begin, self._end = self._end, self._end + len(data)
        self.parts.append(data)
        return {"offset": begin, "length": len(data)}


def _description_bytes(sentence: Sentence, omit_tokens: bool) -> int:
    tokens = sentence.of_rows(sentence.tokens)
    text = 0 if omit_tokens else sum(_CHARACTER_BYTES * len(token) for token in tokens)
    return text + _SENTENCE_OVERHEAD_BYTES + _TOKEN_OVERHEAD_BYTES * len(tokens)


def _described(sentence: Sentence, omit_tokens: bool) -> dict[str, Any]:
    """Return an embedding's fields but tensor and state; offsets only where the input was text."""
    found: dict[str, Any] = {} if omit_tokens else {"tokens": sentence.of_rows(sentence.tokens)}
    if sentence.starts:
        found |= {
            "token_starts": sentence.of_rows(sentence.starts),
            "token_ends": sentence.of_rows(sentence.ends),
        }
    return {**found, "truncated": sentence.truncated}


def _state_bytes(model: EmbeddingModel, sentence: Sentence, result: Result) -> bytes:
    codec = model.state_codec
    if not sentence.return_state or codec is None or result.state is None:
        return b""
    return codec.encode(result.state)


def _usage(model: EmbeddingModel, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> dict[str, Any]:
    computed = [(s, r) for s, r in zip(sentences, results, strict=True) if not isinstance(r, RefusalError)]

    def longest(seconds: Callable[[Result], float]) -> float:
        return max([seconds(result) for _, result in computed], default=0.0)

    return {
        "queue_seconds": longest(lambda result: result.queue_s),
        "inference_seconds": longest(lambda result: result.inference_s),
        "tokens": sum([len(sentence.tokens) for sentence, _ in computed]),
        "model_version": model.version,
    }
