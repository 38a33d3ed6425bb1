"""gRPC connections that go wrong: a function for each kind, from random numbers to what is sent and must come back.

The same numbers give the same bytes. Everything is bounded: at most some thousand frames, some hundred KiB.
"""

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from bilm_api.inference import open_inference_pb2
from bilm_api.v1 import embed_pb2
from google.protobuf.message import Message

from tests.security.fuzz_http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Headers,
    call,
    call_headers,
    data_frames,
    frame,
    header_block,
    header_frames,
    integer,
    message,
    opening,
    settings,
)
from tests.security.fuzz_messages import (
    almost,
    almost_stream,
    damage,
    embed_request,
    health_request,
    infer_request,
    infer_texts_request,
    model_request,
    ready_request,
)
from tests.security.security_support import (
    EMBED_PATH,
    HEALTH_PATH,
    INFER_PATH,
    MODEL_PATH,
    MODELS_PATH,
    READY_PATH,
    RELOAD_PATH,
    STREAM_PATH,
)


@dataclass(frozen=True)
class Case:
    """What a connection sends.

    Attributes:
        data: all of it.
        expected: streams that must end, in a status or a reset, unless the server refuses the whole connection.
        settles: whether to wait, before the end is said, until the server has no more to say.
        answers: what the messages are that come back on a stream.
    """

    data: bytes
    expected: tuple[int, ...] = ()
    settles: bool = False
    answers: tuple[tuple[int, type[Message]], ...] = ()


PATHS = tuple(
    path.encode()
    for path in (
        EMBED_PATH, STREAM_PATH, MODEL_PATH, HEALTH_PATH, INFER_PATH, READY_PATH, MODELS_PATH, RELOAD_PATH
    )
)  # fmt: skip
_EMBED, _STREAM, _MODEL, _HEALTH, _INFER, _READY, _MODELS, _RELOAD = PATHS
_BODIES = {_EMBED: embed_request().SerializeToString(), _INFER: infer_request().SerializeToString()}
_ZEROS = bytes(40 * 2**20)


def conversation(rng: random.Random) -> list[bytes]:
    """Some good calls, as a list of frames and headers with data."""
    parts = [opening(), frame(SETTINGS, ACK, 0)]
    for i in range(rng.choice((1, 1, 2, 4))):
        path = rng.choice(PATHS)
        body = _BODIES.get(path, b"")
        parts += [header_frames(2 * i + 1, header_block(call_headers(path))), data_frames(2 * i + 1, message(body))]
    return parts


def random_bytes(rng: random.Random) -> Case:
    start = rng.choice((b"", PREFACE, PREFACE[: rng.randrange(len(PREFACE))], opening(), b"GET / HTTP/1.1\r\n\r\n"))
    return Case(start + rng.randbytes(rng.choice((0, 1, 9, 100, 5000, 70_000))))


def mutated(rng: random.Random) -> Case:
    data = b"".join(conversation(rng))
    for _ in range(rng.choice((1, 1, 2, 6))):
        data = damage(rng, data)
    return Case(data, settles=rng.random() < 0.3)


def shuffled(rng: random.Random) -> Case:
    parts = conversation(rng) + conversation(rng)[1:]
    for _ in range(rng.choice((1, 2, 5))):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        parts[i], parts[j] = parts[j], parts[i]
    return Case(
        b"".join(rng.sample(parts, rng.randrange(1, len(parts) + 1)) if rng.random() < 0.3 else parts),
        settles=rng.random() < 0.3,
    )


def truncated(rng: random.Random) -> Case:
    data = b"".join(conversation(rng))
    return Case(data[: rng.randrange(len(data))])


def huge_lengths(rng: random.Random) -> Case:
    kind, flags = rng.randrange(12), rng.randrange(256)
    length = rng.choice((16385, 2**20, 2**24 - 1, 0, 1, 5))
    lie = frame(kind, flags, rng.choice((0, 1, 2, 3, 2**31 - 1)), rng.randbytes(rng.choice((0, 8, 2000))), length)
    return Case(b"".join(conversation(rng)) + lie + call(9, _MODEL, b""))


def any_frame(rng: random.Random) -> Case:
    """Frames of every type, with flags, streams and sizes that don't belong to it."""
    frames = [
        frame(rng.randrange(14), rng.randrange(256), rng.choice((0, 1, 1, 3, 2, 2**32 - 1)), rng.randbytes(size))
        for size in rng.choices((0, 1, 4, 5, 6, 8, 40), k=rng.choice((1, 3, 20)))
    ]
    return Case(b"".join(conversation(rng)) + b"".join(frames), settles=rng.random() < 0.3)


def hpack_garbage(rng: random.Random) -> Case:
    good = header_block(call_headers(_MODEL))
    block = rng.choice(
        (
            rng.randbytes(rng.choice((1, 30, 400))),
            integer(rng.choice((0, 62, 127, 2**31, 2**63)), 7, 0x80),  # an index that there isn't
            b"\xff" + b"\xff" * rng.choice((4, 9, 100)) + b"\x01",  # a number that doesn't end
            integer(rng.choice((4097, 2**20, 2**31)), 5, 0x20) + good,  # a table larger than allowed
            good + integer(0, 5, 0x20),  # resized where it may not be
            b"\0" + integer(2**28, 7) + b"x",  # a name longer than the block
            b"\0\x81\xff\x01x",  # Huffman, padded with what it may not be padded with
            b"\0\x84\xff\xff\xff\xff\x01x",  # Huffman, the end-of-string symbol
            (b"\x40\x01" + b"a" + integer(4000, 7) + b"b" * 4000) + b"\xbe" * rng.choice((10, 5000)),  # a bomb
            damage(rng, good),
        )
    )
    return Case(opening() + header_frames(1, block) + data_frames(1, message(b"")) + call(3, _MODEL, b""), (3,))


def flood(rng: random.Random) -> Case:
    """Many of the frames that cost the sender nothing; bounded."""
    n = rng.choice((50, 300, 2000))
    one: Callable[[int], bytes] = rng.choice(
        (
            lambda _: settings((rng.randrange(1, 8), rng.choice((0, 1, 16384, 2**31 - 1, 2**32 - 1)))),
            lambda i: frame(PING, rng.choice((0, 0, 0, ACK)), 0, struct.pack(">Q", i)),
            lambda i: call(2 * i + 1, _MODEL, b"") + frame(RST_STREAM, 0, 2 * i + 1, struct.pack(">I", 8)),
            lambda i: header_frames(2 * i + 1, header_block(call_headers(_STREAM))),
            lambda i: frame(RST_STREAM, 0, 2 * i + 1, struct.pack(">I", rng.randrange(14))),
            lambda _: frame(WINDOW_UPDATE, 0, rng.choice((0, 1)), struct.pack(">I", rng.choice((0, 1, 2**31 - 1)))),
            lambda i: frame(PRIORITY, 0, 2 * i + 1, struct.pack(">IB", rng.choice((0, 2 * i + 1)), 255)),
            lambda _: frame(DATA, rng.choice((0, PADDED)), 1, b"\0" if rng.random() < 0.5 else b""),
            lambda _: frame(CONTINUATION, 0, 1, b""),
            lambda _: frame(GOAWAY, 0, 0, struct.pack(">II", rng.choice((0, 1, 2**31 - 1)), rng.randrange(14))),
        )
    )
    first = header_frames(1, header_block(call_headers(_EMBED))) if rng.random() < 0.5 else b""
    if rng.random() < 0.1:
        first = frame(HEADERS, 0, 1, header_block(call_headers(_EMBED)))  # not ended: only CONTINUATION may follow
    return Case(opening() + first + b"".join(map(one, range(n))))


def headers(rng: random.Random) -> Case:
    """Too large, too many, or not as HTTP/2 or gRPC want them."""
    more: Headers = rng.choice(
        (
            [(b"x-large", b"v" * rng.choice((8_000, 16_000, 17_000, 100_000)))],
            [(b"x-%d" % i, b"v" * 20) for i in range(rng.choice((10, 200, 2000)))],
            [(b"n" * rng.choice((100, 9000, 20_000)), b"v")],
            [(b"grpc-timeout", rng.choice((b"", b"0n", b"-1S", b"99999999H", b"1x", b"9" * 40 + b"S", b"1S1S")))],
            [(b"grpc-encoding", rng.choice((b"", b"gzip", b"deflate", b"nonsense", b"identity,gzip")))],
            [(rng.choice((b"", b"X-Upper", b"sp ace", b"a\0b", b":unknown", b"\xff")), rng.randbytes(5))],
            [(b"x-bin", rng.choice((b"====", b"\xff\xfe", b"a" * 4001))), (b"grpc-trace-bin", rng.randbytes(40))],
            [(b"traceparent", rng.choice((b"00-0-0-0", b"ff" * 200, b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01")))],
            [(b"authorization", rng.choice((b"", b"Bearer", b"Bearer " + rng.randbytes(8), b"Basic \xff")))],
        )
    )
    found = call_headers(rng.choice(PATHS), *more)
    if rng.random() < 0.5:
        i = rng.randrange(len(found))
        odd = (b"", b"GET", b"https", b"/", b"/a/b", b"text/html", b"application/grpc+json", rng.randbytes(9), b"*")
        changed = rng.choice(([], [found[i], found[i]], [(found[i][0], rng.choice(odd))]))
        found[i : i + 1] = changed
    elif rng.random() < 0.2:
        found[2] = b":path", rng.choice((b"/", b"//", b"", found[2][1], b"/a")) + rng.choice((b"\xff", b"\0", b"\xc3"))
    if rng.random() < 0.2:
        rng.shuffle(found)
    return Case(
        opening() + header_frames(1, header_block(found)) + data_frames(1, message(b"")) + call(3, _MODEL, b""), (3,)
    )


def prefix_lies(rng: random.Random) -> Case:
    """Message lengths that aren't, several messages to a unary method, and none."""
    body = embed_request().SerializeToString()
    lengths = (0, 1, len(body) - 1, len(body) + 1, 4 * 2**20, 4 * 2**20 + 1, 2**31 - 1, 2**31, 2**32 - 1)
    data = rng.choice(
        (
            message(body, length=rng.choice(lengths)),
            message(body) + message(body, length=rng.choice(lengths)),
            message(body) * 3,
            message(body)[: rng.randrange(len(body))],
            message(body) + b"\0",
            b"",
        )
    )
    start = header_frames(1, header_block(call_headers(rng.choice(PATHS))))
    return Case(opening() + start + data_frames(1, data), (1,))


def compression(rng: random.Random) -> Case:
    """The compressed flag without an encoding, with another, with rubbish, and with a bomb."""
    body = embed_request().SerializeToString()
    packed = rng.choice((body, zlib.compress(body), _gzip(body), _gzip(body)[:-6], _gzip(_ZEROS), b""))
    data = message(rng.choice((packed, damage(rng, packed))), rng.choice((1, 1, 1, 2, 255)))
    encodings: tuple[Headers, ...] = (
        [],
        [(b"grpc-encoding", rng.choice((b"gzip", b"deflate", b"identity", b"br", b"")))],
    )
    start = header_frames(1, header_block(call_headers(rng.choice(PATHS), *rng.choice(encodings))))
    return Case(opening() + start + data_frames(1, data), (1,))


@cache
def _gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def padded(rng: random.Random) -> Case:
    """Padding and priority that fit, or don't."""
    block, body = header_block(call_headers(_MODEL)), message(b"")
    padding = rng.choice((0, 1, 255))
    claimed = rng.choice((padding, 255, 0))
    head = bytes([claimed]) + rng.randbytes(5) + block + bytes(padding)
    flags = END_HEADERS | PADDED | rng.choice((PRIORITISED, PRIORITISED, 0))
    tail = frame(DATA, END_STREAM | PADDED, 1, bytes([claimed]) + body + bytes(padding))
    return Case(opening() + frame(HEADERS, flags, 1, head) + tail + call(3, _MODEL, b""), (3,))


def cut_calls(rng: random.Random) -> Case:
    """Callers that go away in the middle of a message, of a stream, or with the answer on its way."""
    parts = [opening()]
    for i in range(rng.choice((1, 5, 20))):
        stream = 2 * i + 1
        body = b"".join(map(message, almost_stream(rng)))
        parts.append(header_frames(stream, header_block(call_headers(_STREAM))))
        parts.append(data_frames(stream, body[: rng.randrange(len(body) + 1)], rng.choice((0, 0, END_STREAM))))
        if rng.random() < 0.3:
            parts.append(frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))
    return Case(b"".join(parts), settles=rng.random() < 0.3)


def fields(rng: random.Random) -> Case:
    """Good frames around requests that are almost right."""
    data = call(1, _EMBED, almost(rng, embed_request)) + call(3, _MODEL, almost(rng, model_request))
    stream = b"".join(map(message, almost_stream(rng)))
    data += header_frames(5, header_block(call_headers(_STREAM))) + data_frames(5, stream)
    data += call(7, _HEALTH, almost(rng, health_request)) + call(9, _READY, almost(rng, ready_request))
    data += call(11, _INFER, almost(rng, rng.choice((infer_request, infer_texts_request))))
    data += call(13, _MODELS, rng.randbytes(rng.choice((0, 9)))) + call(15, _RELOAD, rng.randbytes(rng.choice((0, 9))))
    answers = (
        (1, embed_pb2.EmbedResponse),
        (5, embed_pb2.EmbedStreamResponse),
        (11, open_inference_pb2.ModelInferResponse),
    )
    return Case(opening() + data, (1, 3, 5, 7, 9, 11, 13, 15), answers=answers)


FRAME_KINDS: tuple[Callable[[random.Random], Case], ...] = (
    random_bytes,
    mutated,
    shuffled,
    truncated,
    huge_lengths,
    any_frame,
    hpack_garbage,
    flood,
    headers,
    prefix_lies,
    compression,
    padded,
    cut_calls,
    fields,
)
