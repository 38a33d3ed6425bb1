"""/v1/embed on a real server: each field of `Embed`, the same bits in each format, refusals at every field."""

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2

from tests.integration.integration_support import options
from tests.support.http_calls import Answer, call
from tests.support.servers import LoopServer, serving

OCTETS = "application/octet-stream"
LONG = "x" * 60
SENTENCES: list[dict[str, Any]] = [
    {"text": 'Ünïcödé — "quoted" \\ wörds .'},
    {"tokens": ["a", LONG, "\x01\n"]},
    {"tokens": []},
    {"text": "She works at a bank .", "return_state": True},
]
POOLED = [sentence for sentence in SENTENCES if sentence.get("tokens") != []]
ROWS: list[dict[str, Any]] = [
    {"text": "She works at a bank .", "rows": [4, 0, 4]},
    {"tokens": ["a", LONG], "rows": [1]},
    {"tokens": ["a", "b"], "rows": [2]},
]
SPANS: list[dict[str, Any]] = [
    *ROWS,
    {"text": "She works at a bank .", "spans": [[0, 2], [4, 5]]},
    {"text": "Shé works at a bank .", "spans": [[1, 9]], "span_unit": "bytes"},
    {"tokens": ["a", "b"], "spans": [[0, 1]], "span_unit": "bytes"},
]
LAYERS = {
    "all": embed_pb2.LAYERS_ALL, "top": embed_pb2.LAYERS_TOP,
    "average": embed_pb2.LAYERS_AVERAGE, "mix": embed_pb2.LAYERS_MIX,
}  # fmt: skip
POOLINGS = {"none": embed_pb2.POOLING_NONE, "mean": embed_pb2.POOLING_MEAN, "max": embed_pb2.POOLING_MAX}
TYPES = {
    "float32": embed_pb2.DATA_TYPE_FLOAT32, "float16": embed_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": embed_pb2.DATA_TYPE_BFLOAT16,
}  # fmt: skip
UNITS = {"tokens": embed_pb2.SPAN_UNIT_TOKENS, "bytes": embed_pb2.SPAN_UNIT_BYTES}
NAMES = {value: name for name, value in TYPES.items()}


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving("--http-listen", "127.0.0.1:0") as server:
        yield server


def ask(server: LoopServer, body: object, **options: Any) -> Answer:
    return call(server.http.address, "POST", "/v1/embed", body, **options)


def by_grpc(server: LoopServer, sentences: list[dict[str, Any]], asked: Mapping[str, Any]) -> Any:
    """Return the response of `Embed` to what a body asks for."""
    fields = {
        "layers": LAYERS[asked.get("layers", "all")],
        "pooling": POOLINGS[asked.get("pooling", "none")],
        "data_type": TYPES[asked.get("data_type", "float32")],
        "l2_normalize": asked.get("l2_normalize", False),
        "omit_tokens": asked.get("omit_tokens", False),
    }
    if "mix" in asked:
        fields["mix"] = embed_pb2.ScalarMix(**asked["mix"])
    messages = []
    for sentence in sentences:
        given = dict(sentence)
        if "tokens" in given:
            given["tokens"] = embed_pb2.Tokens(tokens=given["tokens"])
        if "state" in given:
            given["state"] = base64.b64decode(given["state"])
        if "rows" in given:
            given["rows"] = embed_pb2.Rows(rows=given["rows"])
        if "spans" in given:
            spans = [embed_pb2.Span(start=start, end=end) for start, end in given["spans"]]
            given["spans"] = embed_pb2.Spans(spans=spans, unit=UNITS[given.pop("span_unit", "tokens")])
        messages.append(embed_pb2.Sentence(**given))
    return server.stub().Embed(embed_pb2.EmbedRequest(options=options(**fields), sentences=messages))


def check_embedding(found: Mapping[str, Any], expected: Any, vectors: bytes, state: bytes) -> None:
    """Compare an embedding with the contract's message."""
    tensor = found["tensor"]
    assert found.get("tokens", []) == list(expected.tokens)
    assert found.get("token_starts", []) == list(expected.token_starts)
    assert found.get("token_ends", []) == list(expected.token_ends)
    assert found["truncated"] == expected.truncated
    assert (tensor["shape"], tensor["data_type"]) == (list(expected.tensor.shape), NAMES[expected.tensor.data_type])
    assert vectors == expected.tensor.data
    assert state == expected.state


def from_numbers(tensor: Mapping[str, Any]) -> bytes:
    """Return the bytes that numbers stand for."""
    values = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    if tensor["data_type"] == "bfloat16":
        bits = values.view(np.uint32)
        assert not (bits & 0xFFFF).any()
        return (bits >> 16).astype("<u2").tobytes()
    return values.astype({"float32": "<f4", "float16": "<f2"}[tensor["data_type"]]).tobytes()


ASKED: list[dict[str, Any]] = [
    {},
    {"layers": "top", "data_type": "float16"},
    {"layers": "average", "omit_tokens": True},
    {"layers": "mix", "mix": {"weights": [0.1, -2, 0.3], "gamma": 0.7, "layer_norm": True}},
    {"layers": "mix", "mix": {"weights": [0.1, 0.2, 0.3]}},
    {"data_type": "bfloat16", "l2_normalize": True},
    {"pooling": "mean", "data_type": "bfloat16"},
    {"pooling": "max", "layers": "top", "omit_tokens": True},
]


@pytest.mark.parametrize("asked", ASKED)
def test_everything_that_embed_has_with_the_same_bits(server: LoopServer, asked: dict[str, Any]) -> None:
    sentences = [*POOLED, *SPANS] if "pooling" in asked else [*SENTENCES, *ROWS]
    expected = by_grpc(server, sentences, asked)
    body = {"sentences": sentences, "options": asked, "model": server.model.name}
    packed = ask(server, {**body, "encoding_format": "base64"}).json
    listed = ask(server, body).json
    binary = ask(server, body, headers={"accept": OCTETS})
    for index, result in enumerate(expected.results):
        if result.HasField("error"):
            code = packed["results"][index]["error"]["code"]
            assert code == listed["results"][index]["error"]["code"] == "SELECTION_INVALID"
            continue
        one, two = packed["results"][index]["embedding"], listed["results"][index]["embedding"]
        state = base64.b64decode(one.get("state", ""))
        check_embedding(one, result.embedding, base64.b64decode(one["tensor"]["data"]), state)
        check_embedding(two, result.embedding, from_numbers(two["tensor"]), base64.b64decode(two.get("state", "")))
    check_tensors(binary, expected)
    for usage in (packed["usage"], listed["usage"]):
        assert (usage["tokens"], usage["model_version"]) == (expected.usage.tokens, server.model.version)
        assert usage["inference_seconds"] > 0
        assert usage["queue_seconds"] >= 0


def check_tensors(answer: Answer, expected: Any) -> None:
    """Compare a response of raw tensors with the contract's message."""
    assert answer.headers["content-type"] == OCTETS
    (length,) = struct.unpack_from("<I", answer.body)
    header, data = json.loads(answer.body[4 : 4 + length]), answer.body[4 + length :]
    assert (4 + length) % 64 == 0
    for item, result in zip(header["results"], expected.results, strict=True):
        if result.HasField("error"):
            assert item["error"]["code"] == "SELECTION_INVALID"
            continue
        embedding = item["embedding"]
        vectors, state = (
            data[place["offset"] : place["offset"] + place["length"]] if place else b""
            for place in (embedding["tensor"], embedding.get("state"))
        )
        check_embedding(embedding, result.embedding, vectors, state)
    assert header["usage"]["tokens"] == expected.usage.tokens


def test_a_state_is_continued_from(server: LoopServer) -> None:
    first = ask(server, {"sentences": [{"text": "She works at", "return_state": True}]}).json
    state = first["results"][0]["embedding"]["state"]
    sentences = [{"text": "a bank .", "state": state, "return_state": True}]
    second = ask(server, {"sentences": sentences, "encoding_format": "base64"}).json["results"][0]["embedding"]
    (expected,) = by_grpc(server, sentences, {}).results
    alone = by_grpc(server, [{"text": "a bank ."}], {}).results[0].embedding.tensor.data
    check_embedding(
        second, expected.embedding, base64.b64decode(second["tensor"]["data"]), base64.b64decode(second["state"])
    )
    assert expected.embedding.tensor.data != alone


def test_a_sentence_that_fails_by_itself_has_an_error_for_a_result(server: LoopServer) -> None:
    sentences = [{"text": "a"}, {}, {"tokens": ["a", ""]}, {"text": "a", "state": "AAAA"}, {"text": " "}]
    body = {"sentences": sentences, "options": {"pooling": "mean"}}
    expected = ["", "SENTENCE_MISSING", "TOKEN_EMPTY", "STATE_INVALID", "POOLING_EMPTY"]
    found = ask(server, body).json["results"]
    assert [item.get("error", {}).get("code", "") for item in found] == expected
    assert "tensor" in found[0]["embedding"]
    binary = ask(server, body, headers={"accept": f"text/plain, {OCTETS}"}).body
    header = json.loads(binary[4 : 4 + struct.unpack_from("<I", binary)[0]])
    assert [item.get("error", {}).get("code", "") for item in header["results"]] == expected


def test_a_large_response_has_the_same_bits(server: LoopServer) -> None:
    sentences = [{"tokens": ["word", "another"] * 400}] * 3
    expected = by_grpc(server, sentences, {}).results
    found = ask(server, {"sentences": sentences}).json["results"]
    assert [from_numbers(item["embedding"]["tensor"]) for item in found] == [
        result.embedding.tensor.data for result in expected
    ]


def test_the_version_that_a_client_relies_on(server: LoopServer) -> None:
    sentences = [{"text": "a"}]
    known = {"sentences": sentences, "expected_model_version": server.model.version}
    assert ask(server, known).status == 200
    answer = ask(server, {"sentences": sentences, "expected_model_version": "0"})
    assert (answer.status, answer.code) == (400, "MODEL_VERSION_MISMATCH")


def one(**fields: Any) -> dict[str, Any]:
    return {"sentences": [{"text": "a"}], **fields}


def asking(**fields: Any) -> dict[str, Any]:
    return one(options=fields)


@pytest.mark.parametrize("priority", ["interactive", "batch"])
def test_a_priority_changes_no_bit(server: LoopServer, priority: str) -> None:
    answers = [ask(server, one(encoding_format="base64", **fields)).json for fields in ({}, {"priority": priority})]
    assert answers[0]["results"] == answers[1]["results"]


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "SENTENCES_MISSING", "sentences"),
        ({"sentences": []}, "SENTENCES_MISSING", "sentences"),
        ({"sentences": "a"}, "MALFORMED_REQUEST", "sentences"),
        ({"sentences": [{}] * 1025}, "TOO_MANY_SENTENCES", "sentences"),
        ({"sentences": ["a"]}, "MALFORMED_REQUEST", "sentences[0]"),
        ({"sentences": [{"text": 1}]}, "MALFORMED_REQUEST", "sentences[0].text"),
        ({"sentences": [{"text": "a", "tokens": ["a"]}]}, "MALFORMED_REQUEST", "sentences[0]"),
        ({"sentences": [{"tokens": "a"}]}, "MALFORMED_REQUEST", "sentences[0].tokens"),
        ({"sentences": [{"tokens": [1]}]}, "MALFORMED_REQUEST", "sentences[0].tokens"),
        ({"sentences": [{"text": "a", "state": 1}]}, "MALFORMED_REQUEST", "sentences[0].state"),
        ({"sentences": [{"text": "a", "state": "a"}]}, "MALFORMED_REQUEST", "sentences[0].state"),
        ({"sentences": [{"text": "a", "state": "é"}]}, "MALFORMED_REQUEST", "sentences[0].state"),
        ({"sentences": [{"text": "a", "return_state": 1}]}, "MALFORMED_REQUEST", "sentences[0].return_state"),
        ({"sentences": [{"text": "a", "raws": [1]}]}, "MALFORMED_REQUEST", "sentences[0].raws"),
        ({"sentences": [{"text": "a", "rows": 0}]}, "MALFORMED_REQUEST", "sentences[0].rows"),
        ({"sentences": [{"text": "a", "rows": [True]}]}, "MALFORMED_REQUEST", "sentences[0].rows"),
        ({"sentences": [{"text": "a", "rows": [-1]}]}, "MALFORMED_REQUEST", "sentences[0].rows"),
        ({"sentences": [{"text": "a", "rows": [2**32]}]}, "MALFORMED_REQUEST", "sentences[0].rows"),
        ({"sentences": [{"text": "a", "rows": [0], "spans": [[0, 1]]}]}, "MALFORMED_REQUEST", "sentences[0].rows"),
        ({"sentences": [{"text": "a", "spans": [0, 1]}]}, "MALFORMED_REQUEST", "sentences[0].spans"),
        ({"sentences": [{"text": "a", "spans": [[0, 1, 2]]}]}, "MALFORMED_REQUEST", "sentences[0].spans"),
        ({"sentences": [{"text": "a", "span_unit": "bytes"}]}, "MALFORMED_REQUEST", "sentences[0].span_unit"),
        (
            {"sentences": [{"text": "a", "spans": [[0, 1]], "span_unit": "words"}]},
            "MALFORMED_REQUEST",
            "sentences[0].span_unit",
        ),
        (one(model=1), "MALFORMED_REQUEST", "model"),
        (one(expected_model_version=1), "MALFORMED_REQUEST", "expected_model_version"),
        (one(encoding_format="hex"), "MALFORMED_REQUEST", "encoding_format"),
        (one(options=[]), "MALFORMED_REQUEST", "options"),
        (one(urgency=1), "MALFORMED_REQUEST", "urgency"),
        (one(priority=1), "PRIORITY_INVALID", "priority"),
        (one(priority="low"), "PRIORITY_INVALID", "priority"),
        (asking(layers="first"), "LAYERS_INVALID", "options.layers"),
        (asking(layers=1), "LAYERS_INVALID", "options.layers"),
        (asking(pooling="sum"), "POOLING_INVALID", "options.pooling"),
        (asking(data_type="float64"), "DATA_TYPE_INVALID", "options.data_type"),
        (asking(l2_normalize=0), "MALFORMED_REQUEST", "options.l2_normalize"),
        (asking(omit_tokens="no"), "MALFORMED_REQUEST", "options.omit_tokens"),
        (asking(another=1), "MALFORMED_REQUEST", "options.another"),
        (asking(layers="mix"), "MIX_INVALID", "options.mix"),
        (asking(mix={"weights": [1, 2, 3]}), "MIX_INVALID", "options.mix"),
        (asking(layers="mix", mix={}), "MIX_INVALID", "options.mix.weights"),
        (asking(layers="mix", mix={"weights": [1, 2]}), "MIX_INVALID", None),
        (asking(layers="mix", mix={"weights": [1, 2, "3"]}), "MIX_INVALID", "options.mix.weights"),
        (asking(layers="mix", mix={"weights": [1, 2, True]}), "MIX_INVALID", "options.mix.weights"),
        (asking(layers="mix", mix={"weights": [1, 2, 1e39]}), "MIX_INVALID", "options.mix.weights"),
        (asking(layers="mix", mix={"weights": [1, 2, 3], "gamma": "1"}), "MIX_INVALID", "options.mix.gamma"),
        (
            asking(layers="mix", mix={"weights": [1, 2, 3], "layer_norm": 1}),
            "MALFORMED_REQUEST",
            "options.mix.layer_norm",
        ),
    ],
)
def test_bad_bodies(server: LoopServer, body: object, code: str, field: str | None) -> None:
    answer = ask(server, body)
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, code, field)


def test_what_no_retry_can_help_says_so() -> None:
    body = {"sentences": [{"tokens": ["w"] * 30_000}], "options": {"omit_tokens": True}}
    with serving("--http-listen", "127.0.0.1:0", "--max-tokens-per-request", "32768") as server:
        answer = ask(server, body)
    assert (answer.status, answer.code) == (429, "RESPONSE_TOO_LARGE")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after-ms" not in answer.headers
