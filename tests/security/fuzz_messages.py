"""Requests that are almost right: mutation by the descriptors of the contract, and of what protobuf makes of it."""

import random
from collections.abc import Callable
from typing import Any

from bilm_api.inference import open_inference_pb2
from bilm_api.v1 import embed_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from tests.security.security_support import PLAIN, known_sentences
from tests.support.tensors import texts, tokens

_INTEGERS = (0, 1, -1, 2, 7, 127, 128, 255, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e38, -1e38, 1e-45, float("inf"), float("-inf"), float("nan"), 65504.0)
_TEXTS = (
    "",
    " ",
    "\0",
    "a",
    "<S>",
    "</S>",
    "The cat sat .",
    "\u202e\u200b\ufeff",
    "e\u0301\u0327" * 20,
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0010ffff",
    "\ud7ff\ue000",
    "日本語の文です。",
    "안녕하세요",
    "www.example.com/a?b=c&d#e @@ &amp; &#124; |[]<>'\"",
    "DOTDOTMULTI DOTMULTI. THISISPROTECTED000 @-@",
    "\r\n\t\x0b\x0c\x1c\x85\u2028\u2029",
    "x" * 5000,
    "a " * 700,
    "." * 400,
    "random-tiny",
    "0123456789abcdef",
    "text",
    "tokens",
    "lengths",
    "layers",
    "pooling",
    "mix_weights",
    "timeout",
    "mean",
    "mix",
)
_RANGES: dict[int, tuple[int, int]] = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
# (field number, wire type) as a tag; a length that goes beyond the end; groups; numbers of more than ten bytes
_WIRE = (
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x22\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    b"\x23" * 200,
    b"\x0b\x0c",
    b"\x0c",
    b"\x07",
    b"\xff" * 11,
    b"\x00",
    b"\xf8\xff\xff\xff\x0f\x01",
    b"\x0a\x02\xc3\x28",
    b"\x22\x06\x0a\x04\xed\xa0\x80\x41",
)


def text(rng: random.Random) -> str:
    """A string that some code may stumble over; never a lone surrogate, which protobuf refuses to write."""
    if rng.random() < 0.6:
        return rng.choice(_TEXTS)
    length = rng.choice((1, 3, 20, 60, 300))
    points = (rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000))) for _ in range(length))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def blob(rng: random.Random) -> bytes:
    """Bytes for a state: none, garbage, or the beginning of a real one."""
    length = rng.choice((0, 1, 4, 12, 13, 100, 1292, 5000))
    return rng.choice((b"", b"bLS1", b"bLS1" + bytes(8))) + rng.randbytes(length)


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return blob(rng) if field.type == FieldDescriptor.TYPE_BYTES else text(rng)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}:
        return rng.choice(_FLOATS)
    low, high = _RANGES[kind]
    return max(low, min(high, rng.choice((*_INTEGERS, rng.randrange(8)))))


def _change_repeated(rng: random.Random, found: Message, field: FieldDescriptor) -> None:
    values: Any = getattr(found, field.name)
    action = rng.randrange(5)
    if action == 0 and values:
        del values[rng.randrange(len(values)) :]
    elif action == 1 and values:
        values.extend(list(values) * rng.choice((1, 1, 20)))
    elif field.message_type is None:
        values.extend(_scalar(rng, field) for _ in range(rng.choice((1, 2, 30))))
    elif values and action != 4:
        mutate(rng, rng.choice(values))
    else:
        mutate(rng, values.add())


def _change_map(rng: random.Random, found: Message, field: FieldDescriptor) -> None:
    """Changes a map from strings to messages: no other ones are in requests."""
    values: Any = getattr(found, field.name)
    keys = list(values)
    key = rng.choice(keys) if keys and rng.random() < 0.6 else text(rng)
    if key in keys and rng.random() < 0.2:
        del values[key]
    else:
        mutate(rng, values[key])


def mutate(rng: random.Random, found: Message) -> None:
    """Changes one field, or one below it."""
    fields: list[Any] = list(found.DESCRIPTOR.fields)  # typed in two ways, by two implementations of protobuf
    if not fields:
        return
    field: FieldDescriptor = rng.choice(fields)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _change_map(rng, found, field)
    elif field.is_repeated:
        _change_repeated(rng, found, field)
    elif rng.random() < 0.15:
        found.ClearField(field.name)
    elif field.message_type is not None:
        getattr(found, field.name).SetInParent()
        mutate(rng, getattr(found, field.name))
    else:
        setattr(found, field.name, _scalar(rng, field))


def damage(rng: random.Random, data: bytes) -> bytes:
    """Changes bytes without regard to what they mean."""
    place = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + rng.choice(_WIRE) + data[place:]
        case 2:
            return data[:place] + rng.randbytes(rng.choice((1, 4, 40))) + data[place:]
        case 3:
            return data[:place] + data[place + rng.choice((1, 2, 8)) :]
        case 4:
            return data[place:] + data[:place]
        case _:
            flipped = bytearray(data)
            for _ in range(rng.choice((1, 2, 5)) if data else 0):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)


def embed_request() -> embed_pb2.EmbedRequest:
    return embed_pb2.EmbedRequest(options=PLAIN, sentences=known_sentences())


def selecting_request() -> embed_pb2.EmbedRequest:
    words = embed_pb2.Tokens(tokens=["The", "play", "was", "a", "success", "."])
    spans = [embed_pb2.Span(start=0, end=4), embed_pb2.Span(start=4, end=9), embed_pb2.Span(start=2, end=15)]
    return embed_pb2.EmbedRequest(
        options=embed_pb2.EmbedOptions(layers=embed_pb2.LAYERS_TOP, pooling=embed_pb2.POOLING_MEAN),
        sentences=[
            embed_pb2.Sentence(tokens=words, rows=embed_pb2.Rows(rows=[5, 0, 5])),
            embed_pb2.Sentence(tokens=words, spans=embed_pb2.Spans(spans=[embed_pb2.Span(start=1, end=6)])),
            embed_pb2.Sentence(
                text="Straße, 日本 — and “text”.", spans=embed_pb2.Spans(unit=embed_pb2.SPAN_UNIT_BYTES, spans=spans)
            ),
        ],
    )


def infer_request() -> open_inference_pb2.ModelInferRequest:
    return tokens(["The", "cat"], [], ["sat", "."], layers="top", pooling="none", outputs=["tokens", "embeddings"])


def infer_texts_request() -> open_inference_pb2.ModelInferRequest:
    return texts("The cat sat.", "a", l2_normalize=True, data_type="FP16", id="1")


def ready_request() -> open_inference_pb2.ModelReadyRequest:
    return open_inference_pb2.ModelReadyRequest(name="random-tiny")


def model_request() -> embed_pb2.GetModelRequest:
    return embed_pb2.GetModelRequest(model="random-tiny")


def health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service="bilm_api.v1.EmbedService")


def start_request() -> embed_pb2.EmbedStreamRequest:
    return embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=PLAIN))


def item_request(number: int) -> embed_pb2.EmbedStreamRequest:
    sentences = known_sentences()
    item = embed_pb2.StreamItem(id=number, sentence=sentences[number % len(sentences)])
    return embed_pb2.EmbedStreamRequest(item=item)


def almost(rng: random.Random, new: Callable[[], Message]) -> bytes:
    """A good request with up to eight mutations, one time in four damaged as bytes, too."""
    request = new()
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        mutate(rng, request)
    data = request.SerializeToString()
    return damage(rng, data) if rng.random() < 0.25 else data


def almost_stream(rng: random.Random) -> list[bytes]:
    """The messages of a stream: mostly in order, some missing, some twice."""
    messages = [almost(rng, start_request)] if rng.random() < 0.9 else []
    for i in range(rng.choice((0, 1, 3, 8))):
        number = i if rng.random() < 0.9 else 0
        messages.append(almost(rng, lambda number=number: item_request(number)))  # type: ignore[misc]
    if rng.random() < 0.1:
        rng.shuffle(messages)
    return messages
