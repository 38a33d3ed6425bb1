"""At the limits of what may be sent, and beyond; and what callers send stays out of logs and errors."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from bilm_api.constants import MAX_REQUEST_BYTES
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_model.errors import AlignmentError
from bilm_model.tokenization.tokenizers import new_tokenizer
from grpc_health.v1 import health_pb2

from tests.security.fuzz_http2 import (
    Connection,
    Reply,
    call,
    call_headers,
    data_frames,
    header_block,
    header_frames,
    message,
    opening,
)
from tests.security.security_support import (
    EMBED_PATH,
    HEALTH_PATH,
    INFER_PATH,
    MODEL_PATH,
    PLAIN,
    READY_PATH,
    STREAM_PATH,
    Watch,
    WatchedServer,
    known_sentences,
)
from tests.support.faulty_server import BROKEN, FAILING_TOKENS, UNFIT_TOKENS
from tests.support.processes import MIB, resident_bytes
from tests.support.tensors import texts, tokens

CANARY = "Kanarienvogel7391"
_TIMEOUT_S = 60.0
_INVALID, _EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def server() -> Iterator[WatchedServer]:
    with WatchedServer("--log-level", "debug") as server:
        yield server


@pytest.fixture
def channel(server: WatchedServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


def ending(channel: grpc.Channel, path: str, data: bytes, **arguments: object) -> tuple[grpc.StatusCode, str]:
    """Sends bytes to a unary method: the status and what comes with it, as a text."""
    method = channel.unary_unary(path, _as_it_is, _as_it_is)
    try:
        method(data, timeout=_TIMEOUT_S, **arguments)  # type: ignore[arg-type]
    except grpc.RpcError as error:
        return error.code(), f"{error.details()} {error.trailing_metadata()}"
    return grpc.StatusCode.OK, ""


def _as_it_is(data: bytes) -> bytes:
    return data


def exchange(server: WatchedServer, data: bytes, expected: tuple[int, ...]) -> Reply:
    with Connection(server.address, _TIMEOUT_S) as connection:
        return connection.exchange(opening() + data, expected)


def padded_request(n_bytes: int) -> bytes:
    """A good request of exactly so many bytes: the rest is a field that nobody knows."""
    data = embed_pb2.EmbedRequest(options=PLAIN, sentences=known_sentences()).SerializeToString()
    n_padding = n_bytes - len(data) - 5  # tag (field 15, bytes) and four bytes of length
    length = bytes([n_padding & 127 | 128, n_padding >> 7 & 127 | 128, n_padding >> 14 & 127 | 128, n_padding >> 21])
    padded = data + b"\x7a" + length + bytes(n_padding)
    assert len(padded) == n_bytes
    return padded


def test_message_size(server: WatchedServer, channel: grpc.Channel) -> None:
    assert ending(channel, EMBED_PATH, padded_request(MAX_REQUEST_BYTES))[0] is grpc.StatusCode.OK
    code, text = ending(channel, EMBED_PATH, padded_request(MAX_REQUEST_BYTES + 1))
    assert (code, "larger than max" in text) == (_EXHAUSTED, True)
    stream = channel.stream_stream(STREAM_PATH, _as_it_is, _as_it_is)
    with pytest.raises(grpc.RpcError) as raised:
        list(stream(iter([bytes(MAX_REQUEST_BYTES + 1)]), timeout=_TIMEOUT_S))
    assert raised.value.code() is _EXHAUSTED


def test_a_compressed_message_is_no_larger_than_a_plain_one(server: WatchedServer, channel: grpc.Channel) -> None:
    """100 MiB in 100 KiB: refused before they are in memory."""
    before = resident_bytes(server.pid)
    code, _ = ending(channel, EMBED_PATH, bytes(100 * MIB), compression=grpc.Compression.Gzip)
    assert code is _EXHAUSTED
    assert resident_bytes(server.pid) - before < 64 * MIB


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ([("x-value", "v" * 4000)], grpc.StatusCode.OK),
        ([("x-value", "v" * 17_000)], _EXHAUSTED),
        ([("x-value", "v" * 1_000_000)], _EXHAUSTED),
        ([(f"x-value-{i}", "v" * 1000) for i in range(60)], _EXHAUSTED),
        ([(f"x{i}", "") for i in range(5000)], _EXHAUSTED),
    ],
    ids=["small", "beyond 16 KiB", "1 MB", "many", "many empty"],
)
def test_metadata_size(server: WatchedServer, metadata: list[tuple[str, str]], code: grpc.StatusCode) -> None:
    with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        assert ending(channel, MODEL_PATH, b"", metadata=metadata)[0] is code
        assert ending(channel, MODEL_PATH, b"")[0] is grpc.StatusCode.OK


@pytest.mark.parametrize("path", [EMBED_PATH, MODEL_PATH, HEALTH_PATH, INFER_PATH, READY_PATH])
@pytest.mark.parametrize("data", [b"", b"\0", message(bytes(100))[:50]], ids=["no message", "a byte", "half a message"])
def test_a_call_without_a_whole_message_gets_a_status(server: WatchedServer, path: str, data: bytes) -> None:
    start = header_frames(1, header_block(call_headers(path.encode())))
    reply = exchange(server, start + data_frames(1, data), (1,))
    assert reply.statuses[1][0] == _INVALID.value[0]


def test_a_path_that_is_not_utf_8() -> None:
    """One such call ends the accepting of calls in grpc.aio 1.85: the server must be there again."""
    with WatchedServer() as server:
        watch = Watch(server)
        for path in (b"/" + CANARY.encode() + b"\xff", b"\xff"):
            exchange(server, call(1, path, b""), (1,))
            assert [line for line in watch.complaints() if "in the log" not in line] == []
        assert CANARY not in server.stop()


@pytest.mark.parametrize("path", [EMBED_PATH, MODEL_PATH, HEALTH_PATH, INFER_PATH, READY_PATH])
def test_a_message_that_does_not_parse(server: WatchedServer, channel: grpc.Channel, path: str) -> None:
    assert ending(channel, path, b"\xff\xff\xff")[0] is _INVALID


@pytest.mark.parametrize(
    "pattern", ["the cat sat . ", "x.y. ", "xy. a ", ", ", ",", "&", "a\x01b ", "[", "1,", "http://a/b ", "日", ".a"]
)
def test_no_text_takes_unduly_long_to_cut(pattern: str) -> None:
    """Some patterns took 20 s where they should take 20 ms: longer than a test may for as many texts as these."""
    tokenizer, text = new_tokenizer("moses", "en"), (pattern * 20_000)[:16_384]
    for _ in range(7):
        with contextlib.suppress(AlignmentError):
            tokenizer(text)


# ---- the canary ----


def _requests() -> Iterator[bytes]:
    """Embed requests with the canary wherever text or bytes go, most of them bad in one way or another."""
    words = embed_pb2.Tokens(tokens=[CANARY, "a"])
    state = b"bLS1" + CANARY.encode()
    sentences = [
        embed_pb2.Sentence(tokens=words),
        embed_pb2.Sentence(text=CANARY),
        embed_pb2.Sentence(text=f"DOTDOTMULTI {CANARY}"),  # Moses changes it: no offsets
        embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=[CANARY, ""])),
        embed_pb2.Sentence(tokens=words, state=CANARY.encode()),
        embed_pb2.Sentence(tokens=words, state=state),
    ]
    good = embed_pb2.EmbedRequest(options=PLAIN, sentences=sentences)
    yield good.SerializeToString()
    yield embed_pb2.EmbedRequest(options=PLAIN, sentences=sentences, model=CANARY).SerializeToString()
    yield embed_pb2.EmbedRequest(options=PLAIN, sentences=sentences, expected_model_version=CANARY).SerializeToString()
    yield embed_pb2.EmbedRequest(sentences=sentences).SerializeToString()
    yield embed_pb2.EmbedRequest(options=PLAIN, sentences=sentences[:1] * 2000).SerializeToString()
    many = embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=[CANARY] * 20_000))
    yield embed_pb2.EmbedRequest(options=PLAIN, sentences=[many]).SerializeToString()
    for n_tokens in (UNFIT_TOKENS, FAILING_TOKENS):
        failing = embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=[CANARY] * n_tokens))
        yield embed_pb2.EmbedRequest(options=PLAIN, sentences=[failing]).SerializeToString()
    yield good.SerializeToString()[:-3] + b"\xff"
    yield CANARY.encode()
    yield b"\x0a\x14" + CANARY.encode() + b"\xff\xfe\xfd"  # a model's name that is not UTF-8


def _infer_requests() -> Iterator[bytes]:
    """Requests of the Open Inference Protocol with the canary as their sentences, most of them bad in one way.

    What a message may quote is a name: of a tensor, a parameter, a choice.
    """
    places = ["token_starts", "tokens"]
    many = [CANARY] * 20_000
    for request in (
        tokens([CANARY, "a"], outputs=["tokens", "embeddings"]),
        tokens([CANARY, ""]),
        tokens([CANARY], outputs=places),
        tokens(many),
        tokens([CANARY], model_name=CANARY),
        tokens([CANARY], model_version=CANARY, id=CANARY),
        tokens([CANARY] * UNFIT_TOKENS),
        tokens([CANARY] * FAILING_TOKENS),
        texts(f"DOTDOTMULTI {CANARY}", CANARY, outputs=places),
        texts(CANARY, layers=1),
    ):
        yield request.SerializeToString()
        request.raw_input_contents[0] = request.raw_input_contents[0] + CANARY.encode()
        yield request.SerializeToString()
        request.raw_input_contents[0] = b"\x1f\0\0\0\xff" + CANARY.encode()
        yield request.SerializeToString()


def _unary_endings(channel: grpc.Channel) -> Iterator[str]:
    metadata = [(f"x-{CANARY.lower()}", CANARY), ("x-bin", CANARY.encode()), ("authorization", f"Bearer {CANARY}")]
    for data in _requests():
        yield from map(str, ending(channel, EMBED_PATH, data, metadata=metadata))
    for data in _infer_requests():
        yield from map(str, ending(channel, INFER_PATH, data, metadata=metadata))
    yield from map(str, ending(channel, INFER_PATH, CANARY.encode()))
    yield from map(str, ending(channel, READY_PATH, CANARY.encode()))
    model = embed_pb2.GetModelRequest(model=CANARY, expected_model_version=CANARY).SerializeToString()
    yield from map(str, ending(channel, MODEL_PATH, model, metadata=[("traceparent", CANARY)]))
    yield from map(str, ending(channel, MODEL_PATH, CANARY.encode(), metadata=[("x-large", CANARY * 2000)]))
    health = health_pb2.HealthCheckRequest(service=CANARY).SerializeToString()
    yield from map(str, ending(channel, HEALTH_PATH, health))
    yield from map(str, ending(channel, HEALTH_PATH, CANARY.encode()))
    yield from map(str, ending(channel, f"/{CANARY}/{CANARY}", CANARY.encode()))
    yield from map(str, ending(channel, f"/bilm_api.v1.EmbedService/{CANARY}", CANARY.encode()))


def _stream_endings(channel: grpc.Channel) -> Iterator[str]:
    stub = embed_pb2_grpc.EmbedServiceStub(channel)
    for data in _requests():
        try:
            request = embed_pb2.EmbedRequest.FromString(data)
        except Exception:
            continue
        start = embed_pb2.StreamStart(options=request.options, model=request.model, carry_state=True)
        items = [embed_pb2.StreamItem(id=i, sentence=s) for i, s in enumerate(request.sentences[:20])]
        sent = [embed_pb2.EmbedStreamRequest(start=start), *(embed_pb2.EmbedStreamRequest(item=i) for i in items)]
        try:
            for answer in stub.EmbedStream(iter([*sent, sent[0]]), timeout=_TIMEOUT_S):
                yield str(answer.error)
        except grpc.RpcError as error:
            yield f"{error.details()} {error.trailing_metadata()}"


def _raw_endings(server: WatchedServer) -> Iterator[str]:
    canary, embed = CANARY.encode(), EMBED_PATH.encode()
    odd = (b"grpc-timeout", b"grpc-encoding", b"user-agent", b":authority", b"content-type", b"te", b"\xff" + canary)
    blocks = [header_block(call_headers(embed, (name, canary))) for name in odd]
    blocks += [header_block(call_headers(b"/" + canary)), canary]
    for block in blocks:
        yield str(exchange(server, header_frames(1, block) + data_frames(1, message(canary)), ()))
    yield str(exchange(server, canary * 100, ()))
    yield str(exchange(server, header_frames(1, header_block(call_headers(embed))) + data_frames(1, canary), ()))
    yield str(exchange(server, call(1, embed, canary), (1,)))


def test_what_callers_send_is_in_no_log_and_no_error(tmp_path: Path) -> None:
    """At the most talkative level, through every door, with an engine that fails in both ways."""
    options = {"module": "tests.support.faulty_server", "environment": {BROKEN: str(tmp_path / "broken")}}
    with WatchedServer("--log-level", "debug", **options) as server:
        watch = Watch(server)
        with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            endings = [*_unary_endings(channel), *_stream_endings(channel)]
        endings += _raw_endings(server)
        assert sum("internal error" in text for text in endings) >= 2  # the engine did fail; of an Embed, one sentence
        assert [line for line in watch.complaints() if "in the log" not in line] == []
        log = server.stop()
    for name in (CANARY, CANARY.lower()):
        assert [text for text in endings if name in text] == []
        assert [line for line in log.splitlines() if name in line] == []
    assert "the test lets joining fail" in log
    assert "the test lets a round fail" in log
