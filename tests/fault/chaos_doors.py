"""Callers of a chaos run over HTTP and the Open Inference Protocol; each method is one call, every answer compared."""

import base64
import json
import random
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from bilm_api.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub

from tests.fault.chaos_callers import CHANNEL_OPTIONS, LIMIT_S, MAX_RECEIVE_BYTES, some
from tests.fault.chaos_records import Recorder, StatusError
from tests.fault.known_answers import N_BARE_OPTIONS, OPTIONS, KnownAnswers, WrongAnswerError
from tests.security.fuzz_http1 import MalformedResponseError, Response, read_responses
from tests.support.tensors import arrays, texts, tokens

_POOLED_TOP = 2
"""Of `OPTIONS`: what /v1/embeddings can be asked for, too."""
_STATUSES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_DATA_TYPES = {"float32": "FP32", "float16": "FP16"}
_BAD_BODIES: Sequence[tuple[str, bytes, str]] = (
    ("/v1/embeddings", b"{", "INVALID_ARGUMENT MALFORMED_REQUEST"),
    ("/v1/embeddings", b'{"input":[1,2]}', "INVALID_ARGUMENT MALFORMED_REQUEST"),
    ("/v1/embeddings", b'{"input":"a","model":"another"}', "NOT_FOUND MODEL_NOT_FOUND"),
    ("/v1/embed", b'{"sentences":[]}', "INVALID_ARGUMENT SENTENCES_MISSING"),
    ("/v1/embed", b'{"sentences":[{"text":"a"}],"options":{"layers":"mix"}}', "INVALID_ARGUMENT MIX_INVALID"),
    ("/v1/nothing", b"{}", "NOT_FOUND METHOD_NOT_FOUND"),
)


class KserveCallers:
    """A caller of `ModelInfer` on one path."""

    def __init__(self, path: str, target: str, recorder: Recorder, known: KnownAnswers) -> None:
        self._path, self._recorder, self._known = path, recorder, known
        options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES)]
        self._channel = grpc.insecure_channel(target, options=options)
        self._stub: Any = GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def infer(self, chance: random.Random) -> bool:
        """`ModelInfer` with texts, or with tokens."""
        options, new_request = chance.randrange(N_BARE_OPTIONS), chance.choice((texts, tokens))
        corpus, wanted = self._known.corpus, OPTIONS[options]
        fitting = [i for i, sentence in enumerate(corpus) if isinstance(sentence, str) == (new_request is texts)]
        indices = chance.choices(fitting, k=chance.randint(1, 6))
        parameters = {"layers": wanted.get("layers", "all"), "pooling": wanted.get("pool", "none")}
        parameters |= {"data_type": _DATA_TYPES[wanted.get("dtype", "float32")]}
        sentences: Any = [corpus[i] for i in indices]
        request = new_request(*sentences, l2_normalize=wanted.get("l2_normalize", False), **parameters)
        with self._recorder.call("kserve", self._path, LIMIT_S) as attempt:
            found = arrays(self._stub.ModelInfer(request, timeout=LIMIT_S))
            self._check(found, options, indices)
        return attempt.succeeded

    def _check(self, found: Mapping[str, Any], options: int, indices: Sequence[int]) -> None:
        vectors, begin = found["embeddings"], 0
        lengths = found["lengths"].tolist() if "lengths" in found else [None] * len(indices)
        if len(lengths) != len(indices):
            raise WrongAnswerError(f"{len(lengths)} sentences, not {len(indices)}")
        for number, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            if length is None:
                one = vectors[number]
            else:
                one, begin = vectors[begin : begin + length], begin + length
                one = np.moveaxis(one, 1, 0) if one.ndim == 3 else one
            self._known.check_vectors(np.ascontiguousarray(one), options, index)


class HttpCallers:
    """Callers of the HTTP port on one path, each with a connection that it keeps."""

    def __init__(self, path: str, address: str, recorder: Recorder, known: KnownAnswers) -> None:
        self._path, self._recorder, self._known = path, recorder, known
        self._texts = [i for i, sentence in enumerate(known.corpus) if isinstance(sentence, str)]
        self._kept = {name: KeptConnection(address) for name in ("embeddings", "embed", "bad", "health")}

    def close(self) -> None:
        """Close the connections."""
        for connection in self._kept.values():
            connection.close()

    def embeddings(self, chance: random.Random) -> bool:
        """/v1/embeddings, by base64 or as numbers."""
        indices = chance.choices(self._texts, k=chance.randint(1, 6))
        encoding, wanted = chance.choice(("base64", "float")), OPTIONS[_POOLED_TOP]
        body = {
            "input": [self._known.corpus[index] for index in indices],
            "encoding_format": encoding,
            "layers": wanted["layers"],
            "pooling": wanted["pool"],
        }
        with self._recorder.call("http embeddings", self._path, LIMIT_S) as attempt:
            items = json.loads(self._answer("embeddings", "/v1/embeddings", body))["data"]
            for item, index in zip(items, indices, strict=True):
                data = item["embedding"]
                vector = _from_base64(data) if isinstance(data, str) else np.array(data, np.float32)
                self._known.check_vectors(vector, _POOLED_TOP, index)
        return attempt.succeeded

    def embed(self, chance: random.Random) -> bool:
        """/v1/embed, as raw tensors."""
        options, indices = chance.randrange(N_BARE_OPTIONS), some(self._known, chance, 6)
        wanted, corpus = OPTIONS[options], self._known.corpus
        body = {
            "options": {
                "layers": wanted.get("layers", "all"),
                "pooling": wanted.get("pool", "none"),
                "data_type": wanted.get("dtype", "float32"),
                "l2_normalize": wanted.get("l2_normalize", False),
                "omit_tokens": True,
            },
            "sentences": [{"text" if isinstance(corpus[i], str) else "tokens": corpus[i]} for i in indices],
        }
        with self._recorder.call("http embed", self._path, LIMIT_S) as attempt:
            found = self._answer("embed", "/v1/embed", body, accept="application/octet-stream")
            length = int.from_bytes(found[:4], "little")
            header, data = json.loads(found[4 : 4 + length]), found[4 + length :]
            for result, index in zip(header["results"], indices, strict=True):
                tensor = result["embedding"]["tensor"]
                raw = data[tensor["offset"] :][: tensor["length"]]
                vectors = np.frombuffer(raw, "<f2" if tensor["data_type"] == "float16" else "<f4")
                self._known.check_vectors(vectors.reshape(tensor["shape"]), options, index)
        return attempt.succeeded

    def bad(self, chance: random.Random) -> bool:
        """A request that must be refused."""
        path, body, expected = chance.choice(_BAD_BODIES)
        with self._recorder.call("bad http", self._path, LIMIT_S, expected) as attempt:
            self._answer("bad", path, body)
        return not attempt.succeeded

    def health(self, _: random.Random) -> bool:
        """/readyz."""
        with self._recorder.call("http health", self._path, LIMIT_S) as attempt:
            response = self._kept["health"].ask(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n", LIMIT_S)
            if response.status != 200:
                raise StatusError("NOT_SERVING")
        return attempt.succeeded

    def _answer(self, name: str, path: str, body: object, accept: str = "*/*") -> bytes:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\naccept: {accept}\r\n"
        head += f"timeout: {LIMIT_S}\r\ncontent-length: {len(content)}\r\n\r\n"
        response = self._kept[name].ask(head.encode() + content, LIMIT_S)
        if response.status == 200:
            return response.body
        reason = json.loads(response.body)["error"]["code"]
        raise StatusError(f"{_STATUSES.get(response.status, response.status)} {reason}")


class KeptConnection:
    """A connection of HTTP/1.1, made when it is needed, and made anew after it has failed; used by one thread."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = host, int(port)
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, request: bytes, limit_s: float) -> Response:
        """Send a request and return its response, all within a time.

        Raises:
            StatusError: gRPC's status for how the connection failed.
            WrongAnswerError: what came is no response.
        """
        try:
            return self._exchange(request, time.monotonic() + limit_s)
        except TimeoutError:
            self.close()
            raise StatusError("DEADLINE_EXCEEDED") from None
        except OSError:
            self.close()
            raise StatusError("UNAVAILABLE") from None
        except MalformedResponseError as error:
            self.close()
            raise WrongAnswerError(str(error)) from None

    def _exchange(self, request: bytes, end_s: float) -> Response:
        def within(connection: socket.socket) -> socket.socket:
            connection.settimeout(max(end_s - time.monotonic(), 0.001))
            return connection

        if self._socket is None:
            self._socket = socket.create_connection(self._address, max(end_s - time.monotonic(), 0.001))
        within(self._socket).sendall(request)
        received = b""
        while True:
            part = within(self._socket).recv(2**20)
            received += part
            if responses := list(read_responses(received, closed=False)):
                if "close" in responses[0].headers.get("connection", ""):
                    self.close()
                return responses[0]
            if not part:
                raise ConnectionResetError


def _from_base64(data: str) -> Any:
    return np.frombuffer(base64.b64decode(data), "<f4")
