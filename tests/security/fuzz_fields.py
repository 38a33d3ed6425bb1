"""Requests through the server's checks, in this process: coverage says which mutations lead somewhere new.

`python -m tests.security.fuzz_fields` runs it under atheris (libFuzzer); its arguments are libFuzzer's.
An input is one byte that says which request, and the request: a message, or JSON for /v1/embed.
"""

import json
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from google.protobuf.message import DecodeError, Message

_MEASURED = ["bilm_server", "bilm_model.characters", "bilm_model.engine.state", "sacremoses"]


def _measuring() -> AbstractContextManager[object]:
    """Where this is the program, imports inside are made to tell which of their lines run."""
    if __name__ != "__main__":
        return nullcontext()
    import atheris  # type: ignore[import-untyped]

    context: AbstractContextManager[object] = atheris.instrument_imports(include=_MEASURED)
    return context


with _measuring():
    from bilm_api.constants import Reason
    from bilm_api.inference import open_inference_pb2
    from bilm_api.v1 import embed_pb2
    from bilm_model.characters import bytes_ids, read_bytes
    from bilm_model.engine.types import OutputSpec
    from bilm_model.scalar_mix import Selection
    from bilm_server.config_sources import load_config
    from bilm_server.embedding.conversions import Conversions
    from bilm_server.embedding.preprocessing import Preprocessing, RequestLimits
    from bilm_server.embedding.registry import Registry
    from bilm_server.errors import RefusalError
    from bilm_server.inference.types import Call, Sentence
    from bilm_server.observability.call_record import CallRecord
    from bilm_server.protocols.embed_v1.requests import new_sentence, parse_options
    from bilm_server.protocols.embed_v1.responses import WireFormat
    from bilm_server.protocols.http.embed import parse_query
    from bilm_server.protocols.http.embed_responses import JsonFormat, RawTensors
    from bilm_server.protocols.kserve.inputs import parse_inputs
    from bilm_server.protocols.kserve.outputs import TensorFormat, parse_outputs
    from bilm_server.protocols.kserve.parameters import parse_parameters
    from bilm_server.served_model import ServedModel, load_served_model

    from tests.security.fuzz_json import (
        almost_json,
        chosen_body,
        damaged_json,
        embed_body,
        mutated_json,
        to_json_bytes,
    )
    from tests.security.fuzz_messages import (
        almost,
        damage,
        embed_request,
        infer_request,
        infer_texts_request,
        item_request,
        model_request,
        mutate,
        selecting_request,
        start_request,
    )
    from tests.support.embedders import entered

_LIMITS = RequestLimits.of(load_config(["--max-tokens-per-sentence", "1000", "--max-text-kib", "64"]))
_PLAIN = OutputSpec(Selection("all", "none", False), "float32")
_REQUESTS: tuple[tuple[type[Message], Callable[[], Message]], ...] = (
    (embed_pb2.EmbedRequest, embed_request),
    (embed_pb2.EmbedStreamRequest, start_request),
    (embed_pb2.EmbedStreamRequest, lambda: item_request(0)),
    (embed_pb2.GetModelRequest, model_request),
    (open_inference_pb2.ModelInferRequest, infer_request),
    (open_inference_pb2.ModelInferRequest, infer_texts_request),
    (embed_pb2.EmbedRequest, selecting_request),
)
JSON_KIND = len(_REQUESTS)
"""The kind of input that is JSON."""


class FieldCheck:
    """Sends requests through everything that stands between the wire and the engine."""

    def __init__(self, model: ServedModel, preprocessing: type[Preprocessing]) -> None:
        self._model, self._preprocessing = model, preprocessing(model, _LIMITS)
        embedder: Any = SimpleNamespace(model=model, take=lambda: lambda: None)
        self._models = Registry(_LIMITS, Conversions(), [embedder])

    def __call__(self, data: bytes) -> str:
        """Checks one input; returns what came of it: "malformed", a reason, or "prepared".

        Raises:
            Exception: which is a bug: input may lead to a refusal only.
        """
        try:
            with entered(CallRecord("Embed", "a peer")):
                if _kind(data) == JSON_KIND:
                    self._check_json(data[1:])
                else:
                    self._check(_parsed(data))
        except DecodeError:
            return "malformed"
        except RefusalError as error:
            reason = error.reason
        else:
            return "prepared"
        assert reason is not Reason.INTERNAL
        return reason.value

    def _check(self, request: Message) -> None:
        if isinstance(request, embed_pb2.EmbedStreamRequest):
            if request.WhichOneof("message") == "item":
                return self._prepare(request.item.sentence, _PLAIN)
            request = request.start
        if isinstance(request, open_inference_pb2.ModelInferRequest):
            return self._infer(request)
        assert isinstance(request, embed_pb2.EmbedRequest | embed_pb2.StreamStart | embed_pb2.GetModelRequest)
        self._models.find(request.model, request.expected_model_version)
        if isinstance(request, embed_pb2.GetModelRequest):
            return None
        output = parse_options(request.options, self._model)
        for sentence in request.sentences if isinstance(request, embed_pb2.EmbedRequest) else ():
            self._prepare(sentence, output)
        return None

    def _infer(self, request: open_inference_pb2.ModelInferRequest) -> None:
        self._models.find(request.model_name, request.model_version)
        output = parse_parameters(request.parameters, self._model).output
        contents = parse_inputs(request, _LIMITS)
        names = parse_outputs(request.outputs, text=isinstance(contents[0], str))
        sentences = [Sentence(Call(), content, output) for content in contents]
        for sentence in sentences:
            self._preprocessing.prepare(sentence)
            assert all(sentence.tokens)
        wire = TensorFormat(self._model, request.id, names, len(sentences))
        assert sum(map(wire.overhead_bytes, sentences)) > 0

    def _check_json(self, body: bytes) -> None:
        query = parse_query(body, Call(), _LIMITS)
        self._models.find(query.model, query.version)
        formats = JsonFormat(self._model, query.omit_tokens, query.encoding), RawTensors(self._model, False)
        for sentence in query.sentences:
            self._preprocessing.prepare(sentence)
            assert all(sentence.tokens)
            n_bytes = self._preprocessing.computed_bytes(sentence)
            assert all(n_bytes + wire.overhead_bytes(sentence) > 0 for wire in formats)

    def _prepare(self, message: embed_pb2.Sentence, output: OutputSpec) -> None:
        prepared = new_sentence(message, output, Call())
        self._preprocessing.prepare(prepared)
        wire = WireFormat(self._model, omit_tokens=False)
        assert self._preprocessing.computed_bytes(prepared) + wire.overhead_bytes(prepared) > 0
        n_bytes = len(message.text.encode())
        for start, end in zip(prepared.starts, prepared.ends, strict=True):
            assert 0 <= start < end <= n_bytes
        if prepared.choice is not None:
            rows, lengths = prepared.choice.rows, prepared.choice.span_lengths
            assert 0 <= rows.min() <= rows.max() < len(prepared.tokens)
            assert len(rows) <= _LIMITS.sentence_tokens
            assert lengths is None or (output.pooled and lengths.min() > 0 and lengths.sum() == len(rows))
        for token in prepared.tokens:
            assert token
            assert 0 < int(bytes_ids([read_bytes(token)]).max()) <= 261


def new_check(preprocessing: type[Preprocessing] = Preprocessing) -> FieldCheck:
    """A check on the smallest model."""
    return FieldCheck(load_served_model(load_config(["--model", "random:tiny", "--device", "cpu"])), preprocessing)


def input_of(rng: random.Random) -> bytes:
    """An input without coverage to guide it."""
    kind = rng.randrange(JSON_KIND + 1)
    if kind == JSON_KIND:
        return bytes([kind]) + almost_json(rng, rng.choice((embed_body, chosen_body)))
    return bytes([kind]) + almost(rng, _REQUESTS[kind][1])


def _kind(data: bytes) -> int:
    return data[0] % (JSON_KIND + 1) if data else 0


def _parsed(data: bytes) -> Message:
    """The message of an input.

    Raises:
        DecodeError: it isn't protobuf.
    """
    request = _REQUESTS[_kind(data)][0]()
    request.ParseFromString(data[1:])
    return request


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """As libFuzzer wants it: another input from one that was worth keeping."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.05:
        return input_of(rng)[:max_size]
    try:
        if _kind(data) == JSON_KIND:
            changed = damaged_json(rng, to_json_bytes(rng, mutated_json(rng, json.loads(data[1:]))))
        else:
            request = _parsed(data)
            mutate(rng, request)
            changed = request.SerializeToString()
    except (DecodeError, ValueError, RecursionError):
        changed = damage(rng, data[1:])
    return (data[:1] + (damage(rng, changed) if rng.random() < 0.1 else changed))[:max_size]


if __name__ == "__main__":
    import atheris

    atheris.Setup(sys.argv, new_check(), custom_mutator=_mutate)
    atheris.Fuzz()
