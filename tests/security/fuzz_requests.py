"""Connections to the HTTP door that go wrong: one function for each kind, as `fuzz_frames` has them for gRPC."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.security.fuzz_http1 import HttpCase
from tests.security.fuzz_json import almost_json, chosen_body, embed_body, embeddings_body, to_json_bytes
from tests.security.fuzz_messages import damage

Headers = Sequence[tuple[bytes, bytes]]

_BODIES: dict[bytes, Callable[[], dict[str, Any]]] = {
    b"/v1/embeddings": embeddings_body,
    b"/embeddings": embeddings_body,
    b"/v1/embed": embed_body,
}
_PAGE = (b"/", b"/page/page.js")
_PATHS = (
    *(b"/v1/models", b"/v1/models/random-tiny", b"/healthz", b"/readyz", b"/metrics", b"/openapi.json", b"/nothing"),
    *_PAGE,
)
_TAGS = (b"*", b'"a"', b'W/"', b",,", b"\xff", b'"' + b"0" * 9000)
_JSON = (b"content-type", b"application/json")
_HOST = (b"host", b"localhost")
_HUGE = b"%d" % 2**64
_TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


def head(method: bytes, target: bytes, headers: Headers, version: bytes = b"HTTP/1.1") -> bytes:
    lines = [b"%b %b %b" % (method, target, version), *(b"%b: %b" % pair for pair in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(target: bytes, body: bytes, *more: tuple[bytes, bytes]) -> bytes:
    return head(b"POST", target, [_HOST, _JSON, (b"content-length", b"%d" % len(body)), *more]) + body


def get(target: bytes, *more: tuple[bytes, bytes]) -> bytes:
    return head(b"GET", target, [_HOST, *more])


def good_request(rng: random.Random) -> bytes:
    target = rng.choice((*_BODIES, *_PATHS))
    if target in _BODIES:
        return post(target, to_json_bytes(rng, _BODIES[target]()))
    return get(target, *([(b"if-none-match", rng.choice(_TAGS))] if target in _PAGE else []))


def conversation(rng: random.Random) -> bytes:
    return b"".join(good_request(rng) for _ in range(rng.choice((1, 1, 2, 4))))


def http_noise(rng: random.Random) -> HttpCase:
    start = rng.choice((b"", _TLS_HELLO, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n", b"GET "))
    return HttpCase(start + rng.randbytes(rng.choice((0, 1, 9, 100, 5000, 70_000))))


def http_mutated(rng: random.Random) -> HttpCase:
    data = conversation(rng)
    for _ in range(rng.choice((1, 1, 2, 6))):
        data = damage(rng, data)
    return HttpCase(data, settles=rng.random() < 0.3)


def http_truncated(rng: random.Random) -> HttpCase:
    data = conversation(rng)
    return HttpCase(data[: rng.randrange(len(data))], settles=rng.random() < 0.3, leaves=rng.random() < 0.3)


def http_lines(rng: random.Random) -> HttpCase:
    """Request lines that are wrong, or unusual."""
    method = rng.choice((b"GET", b"HEAD", b"POST", b"OPTIONS", b"CONNECT", b"TRACE", b"get", b"", b"G\0T", b"X" * 9000))
    target = rng.choice(
        (
            b"http://localhost/v1/models", b"http://evil.example/v1/models", b"http://a@localhost/v1/models",
            b"http://[::1]x/", b"https:///v1/models", b"HTTP://LOCALHOST", b"//localhost/v1/models", b"*", b"",
            b"/v1/models/%00%ff%", b"/v1/models/" + b"a" * rng.choice((100, 17_000)), b"/v1//models", b"/../etc/passwd",
            b"/v1/models?" + b"x" * rng.choice((10, 20_000)), b"/v1/models#a", b"localhost:443", b"/v1/\xff", b"/a b",
        )
    )  # fmt: skip
    version = rng.choice(
        (b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"HTTP/1.1x", b"", b"http/1.1")
    )
    return HttpCase(head(method, target, [_HOST], version) + get(b"/healthz"), settles=rng.random() < 0.5)


def http_headers(rng: random.Random) -> HttpCase:
    """Headers that are too large, too many, or not as the endpoints want them."""
    more: Headers = rng.choice(
        (
            [(b"x-large", b"v" * rng.choice((8_000, 16_000, 17_000, 100_000)))],
            [(b"x-%d" % i, b"v" * 20) for i in range(rng.choice((10, 200, 2000)))],
            [(rng.choice((b"", b"sp ace", b"a\0b", b"\xff", b" x", b"n" * 20_000)), rng.randbytes(5))],
            [(b"x-folded", b"a\r\n " + b"b" * 100)],
            [(b"host", rng.choice((b"localhost", b"", b"localhost:abc", b"[::1]x", b"a b", b"\xff", b"x" * 9000)))],
            [(b"expect", rng.choice((b"100-continue", b"200-ok", b"", b"100-continue, x")))],
            [(b"content-type", rng.choice((b"", b"text/plain", b"application/json;charset=latin-1", b";" * 500)))],
            [(b"content-encoding", rng.choice((b"gzip", b"br", b"identity", b"")))],
            [(b"accept", rng.choice((b"application/octet-stream", b"*/*", b"\xff", b"application/octet-stream;q=0")))],
            [(b"timeout", rng.choice((b"0", b"-1", b"1e999", b"nan", b"1_0", b"9" * 5000, b"0.000001")))],
            [(b"authorization", rng.choice((b"", b"Bearer", b"Bearer " + rng.randbytes(8), b"Basic \xff")))],
            [(b"connection", rng.choice((b"upgrade", b"close", b"keep-alive, close", b"\xff"))), (b"upgrade", b"h2c")],
            [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-key", b"AAAA")],
            [(b"traceparent", rng.choice((b"00-0-0-0", b"ff" * 200, b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01")))],
            [(b"x-request-id", rng.choice((b"a" * 5000, b"\xff", b"a,b", b"")))],
        )
    )
    body = to_json_bytes(rng, embeddings_body())
    names = {name for name, _ in more}
    headers = [pair for pair in (_HOST, _JSON) if pair[0] not in names or rng.random() < 0.2]
    sent = head(b"POST", b"/v1/embeddings", [*headers, (b"content-length", b"%d" % len(body)), *more]) + body
    return HttpCase(sent + get(b"/healthz"), settles=rng.random() < 0.5)


def http_lengths(rng: random.Random) -> HttpCase:
    """Lengths that aren't those of the body."""
    body = to_json_bytes(rng, embeddings_body())
    n_bytes = len(body)
    length = rng.choice(
        (
            b"%d" % (n_bytes - 1), b"%d" % (n_bytes + 1), b"0", b"-1", b"+%d" % n_bytes, b"1_0", b"0x10", b"", _HUGE,
            b"%d, %d" % (n_bytes, n_bytes), b"%d, 1" % n_bytes, b"%d" % (2**22 + 1), b"9" * 5000, b"\xb2",
        )
    )  # fmt: skip
    headers = [_HOST, _JSON, (b"content-length", length)]
    if rng.random() < 0.3:
        headers.append((b"content-length", rng.choice((length, b"%d" % n_bytes, b"1"))))
    sent = head(b"POST", b"/v1/embeddings", headers) + body
    return HttpCase(sent + rng.choice((b"", get(b"/healthz"))), settles=rng.random() < 0.5)


def http_chunks(rng: random.Random) -> HttpCase:
    """Chunked bodies, good ones and such that two readers would read differently."""
    body = to_json_bytes(rng, embeddings_body())
    place = rng.randrange(1, len(body))
    parts = [_chunk(body[:place]), _chunk(body[place:]), b"0\r\n\r\n"]
    bad = rng.choice(
        (
            b"", b"", b"g\r\nx\r\n", b"-1\r\nx\r\n", b"0x1\r\nx\r\n", b"1\nx\n", b"2\r\nx\r\n", b"1\r\nxx",
            b'1;a="\r\n', b"%x\r\n" % 2**63, b"f" * 17 + b"\r\n", b"00000000000000000001\r\n \r\n",
            b"1;" + b"e" * 20_000 + b"\r\nx\r\n", b"\r\n",
            b"0\r\nx-trailer: 1\r\n\r\n", b"0\r\n" + b"t: " + b"v" * 20_000 + b"\r\n\r\n",
        )
    )  # fmt: skip
    parts.insert(rng.randrange(len(parts)), bad)
    coding = rng.choice((b"chunked", b"chunked", b"chunked", b"Chunked", b"gzip, chunked", b"chunked, chunked", b"x"))
    headers = [_HOST, _JSON, (b"transfer-encoding", coding)]
    if rng.random() < 0.2:
        headers.append((b"content-length", b"%d" % rng.choice((0, len(body), 5))))
    sent = head(b"POST", rng.choice((b"/v1/embeddings", b"/nothing")), headers) + b"".join(parts)
    return HttpCase(sent + get(b"/healthz"), settles=rng.random() < 0.5)


def http_small_chunks(rng: random.Random) -> HttpCase:
    """A good body in many chunks: it must be answered."""
    body, size = to_json_bytes(rng, embed_body()), rng.randrange(1, 60)
    chunks = b"".join(_chunk(body[i : i + size]) for i in range(0, len(body), size))
    return HttpCase(
        head(b"POST", b"/v1/embed", [_HOST, _JSON, (b"transfer-encoding", b"chunked")]) + chunks + b"0\r\n\r\n", 1
    )


def http_flood(rng: random.Random) -> HttpCase:
    """Many requests in one write, which cost their sender nothing; bounded."""
    n_requests = rng.choice((20, 100, 300))
    one = rng.choice(
        (get(b"/healthz"), get(b"/v1/models"), post(b"/v1/embeddings", b"{"), post(b"/nothing", b"x" * 50))
    )
    return HttpCase(one * n_requests, n_requests if rng.random() < 0.5 else 0)


def http_cut(rng: random.Random) -> HttpCase:
    """Clients that leave in the middle of a body, or with the response on its way."""
    body = to_json_bytes(
        rng, {**embeddings_body(), "input": ["The cat sat ."] * rng.choice((1, 200)), "encoding_format": "float"}
    )
    sent = post(b"/v1/embeddings", body) * rng.choice((1, 3))
    return HttpCase(sent[: rng.choice((len(sent), rng.randrange(len(sent))))], leaves=True)


def http_fields(rng: random.Random) -> HttpCase:
    """Good requests around bodies that are almost right: each is answered."""
    requests = []
    for _ in range(rng.choice((1, 3, 6))):
        target = rng.choice(tuple(_BODIES))
        more = [(b"accept", b"application/octet-stream")] if rng.random() < 0.3 else []
        new_body = chosen_body if target == b"/v1/embed" and rng.random() < 0.5 else _BODIES[target]
        requests.append(post(target, almost_json(rng, new_body), *more))
    return HttpCase(b"".join(requests), len(requests))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HTTP_KINDS: tuple[Callable[[random.Random], HttpCase], ...] = (
    http_noise,
    http_mutated,
    http_truncated,
    http_lines,
    http_headers,
    http_lengths,
    http_chunks,
    http_small_chunks,
    http_flood,
    http_cut,
    http_fields,
)
