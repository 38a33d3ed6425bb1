"""Embed and GetModel, through a real channel."""

import json
import random
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import grpc
import h5py
import numpy as np
import pytest
import torch
from bilm_api.v1 import embed_pb2
from bilm_model.bilm import random_bilm
from bilm_model.characters import character_ids, with_boundaries
from bilm_model.config import SIZES, Residual
from bilm_model.kernels.product_paths import ProductPath, cpu_path
from bilm_model.weights import single_file
from google.rpc import error_details_pb2, status_pb2

from tests.integration.integration_support import PLAIN, options, tokens
from tests.support.servers import LoopServer

SENTENCES = [[f"w{i}", *["x"] * (i % 13), "y"] for i in range(64)]


def array(embedding: embed_pb2.Embedding) -> np.ndarray[Any, Any]:
    return np.frombuffer(embedding.tensor.data, "<f4").reshape(tuple(embedding.tensor.shape))


def embed(server: LoopServer, *sentences: embed_pb2.Sentence, **changes: object) -> embed_pb2.EmbedResponse:
    return server.stub().Embed(embed_pb2.EmbedRequest(options=options(**changes), sentences=sentences))


def reason(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "bilm-serve"
    return str(info.reason)


def refusal(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    metadata: dict[str, Any] = {item.key: item.value for item in error.trailing_metadata()}
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    return error.code(), reason(status), metadata


def test_golden_vectors_through_the_server(golden_server: LoopServer, golden: Path) -> None:
    sentences = json.loads((golden / "sentences.json").read_text(encoding="utf-8"))
    response = embed(golden_server, *(tokens(*sentence) for sentence in sentences))
    with h5py.File(golden / "expected.hdf5") as file:
        for i, result in enumerate(response.results):
            expected = file[f"stateless/{i}"][()]
            found = array(result.embedding)
            assert found.shape == expected.shape
            assert np.abs(found - expected).max(initial=0.0) < 1e-5
            assert list(result.embedding.tokens) == sentences[i]
            assert result.embedding.truncated == any(len(token.encode()) > 48 for token in sentences[i])


@pytest.mark.parametrize("residual", get_args(Residual))
def test_every_residual_is_served_from_a_file(
    residual: Residual, start: Callable[..., LoopServer], tmp_path: Path
) -> None:
    config, path = replace(SIZES["tiny"], residual=residual, n_layers=3), tmp_path / "model.safetensors"
    bilm = random_bilm(config)
    version = single_file.write(path, config, bilm.state_dict())
    server = start("--model", str(path))
    response = embed(server, *(tokens(*sentence) for sentence in SENTENCES))
    assert response.usage.model_version == version
    for sentence, result in zip(SENTENCES, response.results, strict=True):
        ids = torch.from_numpy(character_ids(with_boundaries(sentence))).long()
        expected, _ = bilm(ids, [len(ids)])
        assert np.abs(array(result.embedding) - expected[:, 1:-1].numpy()).max() < 1e-5


def test_company_changes_no_bit(server: LoopServer) -> None:
    alone = [array(embed(server, tokens(*sentence)).results[0].embedding) for sentence in SENTENCES]
    order = random.Random(1).sample(range(64), 64)
    together = embed(server, *(tokens(*SENTENCES[i]) for i in order))
    for i, result in zip(order, together.results, strict=True):
        assert np.array_equal(array(result.embedding), alone[i])

    def is_same(i: int) -> bool:
        return np.array_equal(array(embed(server, tokens(*SENTENCES[i])).results[0].embedding), alone[i])

    with ThreadPoolExecutor(8) as pool:  # under load, in whatever batches come about
        assert all(pool.map(is_same, order * 2))


def test_the_same_call_twice_gives_the_same_bits(server: LoopServer) -> None:
    first, second = (embed(server, tokens("once", "more")).results[0].embedding.tensor.data for _ in range(2))
    assert first == second


def test_raw_text_comes_back_as_tokens_with_their_bytes(server: LoopServer) -> None:
    text = "Naïve “quotes”, don't they?"
    embedding = embed(server, embed_pb2.Sentence(text=text)).results[0].embedding
    data = text.encode()
    pieces = [data[a:b].decode() for a, b in zip(embedding.token_starts, embedding.token_ends, strict=True)]
    assert pieces == list(embedding.tokens) == ["Naïve", "“", "quotes", "”", ",", "don", "'t", "they", "?"]
    as_tokens = embed(server, tokens(*pieces)).results[0].embedding
    assert np.array_equal(array(embedding), array(as_tokens))
    assert not as_tokens.token_starts


def test_tokens_can_be_left_out_and_places_stay(server: LoopServer) -> None:
    embedding = embed(server, embed_pb2.Sentence(text="a b"), omit_tokens=True).results[0].embedding
    assert not embedding.tokens
    assert list(embedding.token_starts) == [0, 2]


@pytest.mark.parametrize(
    ("layers", "pooling", "shape"),
    [
        (embed_pb2.LAYERS_ALL, embed_pb2.POOLING_NONE, [3, 2, 16]),
        (embed_pb2.LAYERS_ALL, embed_pb2.POOLING_MEAN, [3, 16]),
        (embed_pb2.LAYERS_TOP, embed_pb2.POOLING_NONE, [2, 16]),
        (embed_pb2.LAYERS_AVERAGE, embed_pb2.POOLING_MAX, [16]),
        (embed_pb2.LAYERS_MIX, embed_pb2.POOLING_MEAN, [16]),
    ],
)
def test_shapes(server: LoopServer, layers: embed_pb2.Layers, pooling: embed_pb2.Pooling, shape: list[int]) -> None:
    mix = embed_pb2.ScalarMix(weights=[0, 1, 2]) if layers == embed_pb2.LAYERS_MIX else None
    tensor = embed(server, tokens("a", "b"), layers=layers, pooling=pooling, mix=mix).results[0].embedding.tensor
    assert list(tensor.shape) == shape
    assert len(tensor.data) == 4 * np.prod(shape)


def test_number_formats(server: LoopServer) -> None:
    exact = array(embed(server, tokens("a", "b")).results[0].embedding)
    half = embed(server, tokens("a", "b"), data_type=embed_pb2.DATA_TYPE_FLOAT16).results[0].embedding.tensor
    assert np.array_equal(np.frombuffer(half.data, "<f2").reshape(exact.shape), exact.astype(np.float16))
    brain = embed(server, tokens("a", "b"), data_type=embed_pb2.DATA_TYPE_BFLOAT16).results[0].embedding.tensor
    widened = (np.frombuffer(brain.data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(exact.shape)
    assert np.abs(widened - exact).max() <= 2**-8 * np.abs(exact).max()
    assert brain.data_type == embed_pb2.DATA_TYPE_BFLOAT16


def test_mix_and_norm(server: LoopServer) -> None:
    layers = array(embed(server, tokens("a", "b")).results[0].embedding)
    mix = embed_pb2.ScalarMix(weights=[0.0, 0.0, 50.0], gamma=2.0)
    found = embed(server, tokens("a", "b"), layers=embed_pb2.LAYERS_MIX, mix=mix).results[0].embedding
    assert np.allclose(array(found), 2 * layers[2], atol=1e-5)
    unit = embed(server, tokens("a"), layers=embed_pb2.LAYERS_TOP, l2_normalize=True).results[0].embedding
    assert np.linalg.norm(array(unit)) == pytest.approx(1.0)


def test_what_it_cost(server: LoopServer) -> None:
    usage = embed(server, tokens("a", "b"), tokens("c")).usage
    model = server.stub().GetModel(embed_pb2.GetModelRequest())
    assert usage.tokens == 3
    assert usage.model_version == model.version
    assert usage.inference_time.ToNanoseconds() > 0
    assert usage.queue_time.ToNanoseconds() >= 0


def test_the_model_describes_itself(server: LoopServer) -> None:
    model = server.stub().GetModel(embed_pb2.GetModelRequest())
    assert (model.name, model.layer_count, model.width, model.cell_size) == ("random-tiny", 3, 16, 32)
    assert (model.precision, model.max_token_bytes, model.state_bytes) == ("float32", 48, 652)
    assert model.tokenizer.startswith("moses-en (sacremoses")
    assert model.backend.startswith("cpu (")
    assert model.limits.max_request_bytes == 4 * 2**20
    assert len(model.version) == 16


def test_carried_state_is_the_callers(golden_server: LoopServer, golden: Path) -> None:
    sentences = json.loads((golden / "sentences.json").read_text(encoding="utf-8"))
    states: dict[int, bytes] = {}
    with h5py.File(golden / "expected.hdf5") as file:
        for b, batch in enumerate(json.loads(file["stateful"].attrs["batches"])):
            request = [tokens(*sentences[i], state=states.get(j, b""), return_state=True) for j, i in enumerate(batch)]
            for j, result in enumerate(embed(golden_server, *request).results):
                states[j] = result.embedding.state
                expected = file[f"stateful/{b}/{j}"][()]
                assert np.abs(array(result.embedding) - expected).max(initial=0.0) < 1e-5


def test_bfloat16_products_on_request(start: Callable[..., LoopServer], server: LoopServer) -> None:
    rounded = start("--precision", "bfloat16")
    assert rounded.stub().GetModel(embed_pb2.GetModelRequest()).precision == "bfloat16"
    found, exact = (array(embed(where, tokens("a", "word")).results[0].embedding) for where in (rounded, server))
    cosine = (found * exact).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 0.999 < cosine.min() < 1.0


@pytest.mark.parametrize(
    ("flag", "path", "precision"),
    [
        ("auto", ProductPath.PLAIN, "bfloat16"),
        ("auto", ProductPath.ROUNDED_PREPACKED, "float32"),
        ("bfloat16", ProductPath.ROUNDED_PREPACKED, "bfloat16"),
    ],
)
def test_a_server_says_what_it_computes_by(
    start: Callable[..., LoopServer],
    caplog: pytest.LogCaptureFixture,
    flag: str,
    path: ProductPath,
    precision: str,
) -> None:
    caplog.set_level("INFO", "bilm_server.lifecycle")
    started = start("--precision", flag, "--metrics-listen", "127.0.0.1:0", bfloat16=path)
    model = started.stub().GetModel(embed_pb2.GetModelRequest())
    assert model.precision == precision
    stands_in = precision == "bfloat16" and path.rounded
    assert ("in float32 of factors rounded to bfloat16" in model.backend) == stands_in
    (line,) = (line for record in caplog.records if (line := record.getMessage()).startswith("metrics on "))
    with urllib.request.urlopen(line.removeprefix("metrics on ")) as page:
        text = page.read().decode()
    products = path.value if precision == "bfloat16" else cpu_path(torch.float32).value
    assert f'bilm_kernel_path{{model="random-tiny",part="products",path="{products}"}} 1.0' in text
    assert f'precision="{precision}"' in text
    assert "auto" not in text


BAD_SENTENCES = {
    "TOKEN_EMPTY": tokens("a", "", "b"),
    "SENTENCE_MISSING": embed_pb2.Sentence(),
    "SENTENCE_TOO_LONG": tokens(*["x"] * 40_000),
    "STATE_INVALID": tokens("a", state=b"nonsense"),
    "TEXT_NOT_TOKENIZABLE": embed_pb2.Sentence(text="DOTMULTI"),
}


@pytest.mark.parametrize("expected", BAD_SENTENCES)
def test_a_bad_sentence_costs_the_others_nothing(server: LoopServer, expected: str) -> None:
    good = tokens("good", "words")
    alone = embed(server, good).results[0].embedding.tensor.data
    first, bad, last = embed(server, good, BAD_SENTENCES[expected], good).results
    assert reason(bad.error) == expected
    assert bad.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    for result in (first, last):
        assert result.embedding.tensor.data == alone


def test_pooling_an_empty_sentence_is_that_sentences_error(server: LoopServer) -> None:
    results = embed(
        server, tokens(), embed_pb2.Sentence(text="  "), tokens("a"), pooling=embed_pb2.POOLING_MEAN
    ).results
    assert [reason(result.error) for result in results[:2]] == ["POOLING_EMPTY"] * 2
    assert results[2].HasField("embedding")


def test_an_empty_sentence_has_no_rows_and_keeps_its_state(server: LoopServer) -> None:
    state = embed(server, tokens("a", return_state=True)).results[0].embedding.state
    empty = embed(server, tokens(state=state, return_state=True)).results[0].embedding
    assert list(empty.tensor.shape) == [3, 0, 16]
    assert empty.state == state


@pytest.mark.parametrize("damage", ["nan", "version", "length"])
def test_a_state_is_checked(server: LoopServer, damage: str) -> None:
    state = bytearray(embed(server, tokens("a", return_state=True)).results[0].embedding.state)
    if damage == "nan":
        state[-4:] = b"\xff\xff\xff\xff"
    elif damage == "version":
        state[4] ^= 1
    else:
        state.pop()
    assert reason(embed(server, tokens("a", state=bytes(state))).results[0].error) == "STATE_INVALID"


@pytest.mark.parametrize("token", ["\x00", "a\x01\x1b[31m", "x" * 44_000, "🙂" * 20, "\u202e"])
def test_strange_tokens_are_embedded(server: LoopServer, token: str) -> None:
    embedding = embed(server, tokens(token, "next")).results[0].embedding
    assert np.isfinite(array(embedding)).all()
    assert list(embedding.tokens) == [token, "next"]
    assert embedding.truncated == (len(token.encode()) > 48)


def request(
    embed_options: embed_pb2.EmbedOptions | None = PLAIN, *sentences: embed_pb2.Sentence
) -> embed_pb2.EmbedRequest:
    return embed_pb2.EmbedRequest(options=embed_options, sentences=sentences or [tokens("a")])


def mixed(**fields: Any) -> embed_pb2.EmbedRequest:
    return request(options(layers=embed_pb2.LAYERS_MIX, mix=embed_pb2.ScalarMix(**fields)))


NAN = float("nan")
ALL, NONE, FLOAT32 = embed_pb2.LAYERS_ALL, embed_pb2.POOLING_NONE, embed_pb2.DATA_TYPE_FLOAT32
UNSET = {
    "no options": None,
    "empty options": embed_pb2.EmbedOptions(),
    "layers alone": embed_pb2.EmbedOptions(layers=ALL),
    "pooling alone": embed_pb2.EmbedOptions(pooling=NONE),
    "data type alone": embed_pb2.EmbedOptions(data_type=FLOAT32),
    "all but layers": embed_pb2.EmbedOptions(pooling=NONE, data_type=FLOAT32),
    "all but pooling": embed_pb2.EmbedOptions(layers=ALL, data_type=FLOAT32),
    "all but the data type": embed_pb2.EmbedOptions(layers=ALL, pooling=NONE),
}


@pytest.mark.parametrize("case", UNSET)
def test_what_is_not_set_means_all_layers_no_pooling_float32(server: LoopServer, case: str) -> None:
    bare = server.stub().Embed(request(UNSET[case], tokens("a", "word")))
    assert bare.results == embed(server, tokens("a", "word")).results
    assert bare.results[0].embedding.tensor.data_type == FLOAT32


def test_what_is_set_stays_beside_what_is_not(server: LoopServer) -> None:
    bare = server.stub().Embed(request(embed_pb2.EmbedOptions(pooling=embed_pb2.POOLING_MEAN), tokens("a", "word")))
    assert bare.results == embed(server, tokens("a", "word"), pooling=embed_pb2.POOLING_MEAN).results


BAD_REQUESTS = {
    "no sentences": (embed_pb2.EmbedRequest(options=PLAIN), "SENTENCES_MISSING"),
    "too many sentences": (request(PLAIN, *[tokens("a")] * 1025), "TOO_MANY_SENTENCES"),
    "too many tokens": (request(PLAIN, *[tokens(*["a"] * 5600)] * 3), "TOO_MANY_TOKENS"),
    "unknown layers": (request(options(layers=77)), "LAYERS_INVALID"),
    "unknown pooling": (request(options(pooling=77)), "POOLING_INVALID"),
    "unknown data type": (request(options(data_type=77)), "DATA_TYPE_INVALID"),
    "mix without weights": (request(options(layers=embed_pb2.LAYERS_MIX)), "MIX_INVALID"),
    "mix of two": (mixed(weights=[0, 0]), "MIX_INVALID"),
    "mix with NaN": (mixed(weights=[0, 0, NAN]), "MIX_INVALID"),
    "mix without LAYERS_MIX": (
        request(embed_pb2.EmbedOptions(mix=embed_pb2.ScalarMix(weights=[0] * 3))),
        "MIX_INVALID",
    ),
    "NaN gamma": (mixed(weights=[0, 0, 0], gamma=NAN), "MIX_INVALID"),
    "mix that isn't asked for": (request(options(mix=embed_pb2.ScalarMix(weights=[0, 0, 0]))), "MIX_INVALID"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_a_reason(server: LoopServer, case: str) -> None:
    bad, expected = BAD_REQUESTS[case]
    with pytest.raises(grpc.RpcError) as error:
        server.stub().Embed(bad)
    assert refusal(error.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, expected)


def test_the_wrong_model_is_refused_everywhere(server: LoopServer) -> None:
    stub = server.stub()
    cases: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
        ({"model": "other"}, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ({"expected_model_version": "0"}, grpc.StatusCode.FAILED_PRECONDITION, "MODEL_VERSION_MISMATCH"),
    ]
    for fields, code, expected in cases:
        start = embed_pb2.StreamStart(options=PLAIN, **fields)
        for call in (
            lambda fields=fields: stub.GetModel(embed_pb2.GetModelRequest(**fields)),
            lambda fields=fields: stub.Embed(embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens("a")], **fields)),
            lambda start=start: list(stub.EmbedStream(iter([embed_pb2.EmbedStreamRequest(start=start)]))),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert refusal(error.value)[:2] == (code, expected)
    model = stub.GetModel(embed_pb2.GetModelRequest(model="random-tiny"))
    assert stub.GetModel(embed_pb2.GetModelRequest(expected_model_version=model.version)) == model


def test_an_answer_that_does_not_fit_is_refused_before_it_is_computed(start: Callable[..., LoopServer]) -> None:
    server = start("--model", "random:original", "--max-tokens-per-request", "16384")  # 12 KiB a token
    with pytest.raises(grpc.RpcError) as error:
        embed(server, tokens(*["a"] * 1500))
    code, why, metadata = refusal(error.value)
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE")
    assert metadata["grpc-retry-pushback-ms"] == "-1"


NOT_PROTOBUF, NOT_UTF8 = b"\xff\xff\xff", b"\n\x03\xff\xfe\xfd"  # the latter: a model's name
MALFORMED = [
    ("Embed", NOT_PROTOBUF),
    ("Embed", NOT_UTF8),
    ("GetModel", NOT_PROTOBUF),
    ("GetModel", NOT_UTF8),
    ("EmbedStream", NOT_PROTOBUF),
    ("EmbedStream", b"\n\x05" + NOT_UTF8),
]


@pytest.mark.parametrize(("method", "frame"), MALFORMED)
def test_malformed_frames_are_the_callers_fault(server: LoopServer, method: str, frame: bytes) -> None:
    channel: Any = server.channel()
    # The server tells one message from a stream of one by the method, not by the frames
    with pytest.raises(grpc.RpcError) as error:
        list(channel.stream_stream(f"/bilm_api.v1.EmbedService/{method}")(iter([frame])))
    assert refusal(error.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "protobuf" not in str(error.value.details()).lower()


def test_a_message_over_the_limit_never_gets_in(server: LoopServer) -> None:
    with pytest.raises(grpc.RpcError) as error:
        embed(server, tokens("x" * (4 * 2**20)))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
