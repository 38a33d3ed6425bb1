"""The Open Inference Protocol on a fake engine, through gRPC."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from bilm_api.constants import PUSHBACK_KEY, STATUS_DETAILS_KEY, Priority, Reason
from bilm_api.inference import open_inference_pb2 as pb
from bilm_model.engine.types import Capacity, OutputSpec
from bilm_model.scalar_mix import Pooling, Selection
from bilm_server.errors import Code
from bilm_server.inference.types import Call, Result, Sentence
from bilm_server.protocols.kserve.outputs import TensorFormat
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2, status_pb2

from tests.support.embedders import until, worker_of
from tests.support.fake_engine import FakeEngine, fake_model
from tests.support.served import RunningService, serving
from tests.support.tensors import arrays, parameters, raw_bytes, raw_numbers, tensor, texts, tokens

Request = pb.ModelInferRequest
MALFORMED = Reason.MALFORMED_REQUEST


def engine() -> FakeEngine[Sentence]:
    return FakeEngine()


async def infer(served: RunningService, request: Request) -> dict[str, Any]:
    return arrays(await served.kserve.ModelInfer(request))


async def refusal(call: Any) -> tuple[str, str, str, str | None]:
    """Return the status, the reason, the message and the pushback that a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    trailing: dict[str, Any] = dict(iter(error.value.trailing_metadata() or ()))
    info = error_details_pb2.ErrorInfo()
    (detail,) = status_pb2.Status.FromString(trailing[STATUS_DETAILS_KEY]).details
    assert detail.Unpack(info)
    return error.value.code().name, info.reason, error.value.details() or "", trailing.get(PUSHBACK_KEY)


def test_the_messages_are_in_a_pool_of_their_own() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")


# ---- what comes back ----


async def test_texts_come_back_ragged_with_their_tokens_and_places() -> None:
    names = ["token_ends", "embeddings", "tokens", "lengths", "token_starts"]
    async with serving(engine()) as served:
        response = await served.kserve.ModelInfer(texts("a é", "c", outputs=names, id="a name"))
        assert [output.name for output in response.outputs] == names
        found = arrays(response)
        assert found["embeddings"].shape == (3, 3, 4)
        assert found["embeddings"][:, 1, 2].tolist() == [97, ord("é"), 99]
        assert found["lengths"].tolist() == [2, 1]
        assert found["tokens"] == [b"a", "é".encode(), b"c"]
        assert (found["token_starts"].tolist(), found["token_ends"].tolist()) == ([0, 2, 0], [1, 4, 1])
        model = served.embedder.model
        assert (response.model_name, response.model_version, response.id) == (model.name, model.version, "a name")
        cost = {name: value.int64_param for name, value in response.parameters.items()}
        assert cost.keys() == {"tokens", "truncated_sentences", "queue_us", "inference_us"}
        assert (cost["tokens"], cost["truncated_sentences"]) == (3, 0)
        (call,) = served.ended.records
        assert (call.method, call.model) == ("inference.GRPCInferenceService/ModelInfer", "fake")
        assert (call.code, call.sentences, call.failed_sentences, call.tokens) == (Code.OK, 2, 0, 3)


async def test_tokens_are_embedded_as_they_are() -> None:
    async with serving(engine()) as served:
        long = "x" * 60
        response = await served.kserve.ModelInfer(tokens(["b c", "d"], [], [long]))
        found = arrays(response)
        assert found.keys() == {"embeddings", "lengths"}
        assert found["embeddings"][:, 0, 0].tolist() == [98, 100, 120]
        assert found["lengths"].tolist() == [2, 0, 1]
        assert response.parameters["truncated_sentences"].int64_param == 1


async def test_typed_contents_are_what_raw_ones_are() -> None:
    typed = pb.InferTensorContents
    inputs = [
        tensor("lengths", "INT32", 2, contents=typed(int_contents=[1, 2])),
        tensor("tokens", "BYTES", 3, contents=typed(bytes_contents=[b"a", "é".encode(), b"c"])),
    ]
    async with serving(engine()) as served:
        found = await infer(served, Request(inputs=inputs))
        expected = await infer(served, tokens(["a"], ["é", "c"]))
        assert all(np.array_equal(found[name], expected[name]) for name in ("embeddings", "lengths"))
        text = Request(inputs=[tensor("text", "BYTES", 1, contents=typed(bytes_contents=[b"a c"]))])
        assert (await infer(served, text))["lengths"].tolist() == [2]


@pytest.mark.parametrize(
    ("given", "shape", "datatype"),
    [
        ({}, [3, 3, 4], "FP32"),
        ({"layers": "top"}, [3, 4], "FP32"),
        ({"layers": "all", "pooling": "mean"}, [2, 3, 4], "FP32"),
        ({"layers": "average", "pooling": "max", "data_type": "FP16"}, [2, 4], "FP16"),
        ({"layers": "mix", "mix_weights": "0, 1,2e-1", "mix_gamma": 2, "mix_layer_norm": True}, [3, 4], "FP32"),
        ({"layers": "mix", "mix_weights": "0,1,2", "mix_gamma": 0.5}, [3, 4], "FP32"),
        ({"l2_normalize": True, "priority": 3, "timeout": 20_000_000}, [3, 3, 4], "FP32"),
    ],
)
async def test_parameters_choose_what_comes_back(given: dict[str, Any], shape: list[int], datatype: str) -> None:
    async with serving(engine()) as served:
        response = await served.kserve.ModelInfer(tokens(["a", "b"], ["c"], **given))
        names = ["embeddings"] if "pooling" in given else ["embeddings", "lengths"]
        assert [output.name for output in response.outputs] == names
        assert (list(response.outputs[0].shape), response.outputs[0].datatype) == (shape, datatype)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("interactive", Priority.INTERACTIVE), ("batch", Priority.BATCH), (0, Priority.INTERACTIVE),
     (1, Priority.INTERACTIVE), (2, Priority.BATCH), (5, Priority.BATCH)],
)  # fmt: skip
async def test_a_priority_is_a_name_or_one_of_tritons_numbers(asked: str | int, expected: Priority) -> None:
    async with serving(engine()) as served:
        await infer(served, texts("a", priority=asked))
        assert served.ended.records[0].priority is expected


async def test_pooled_vectors_come_with_lengths_where_they_are_asked_for() -> None:
    async with serving(engine()) as served:
        found = await infer(served, tokens(["a", "c"], ["c"], pooling="mean", outputs=["lengths", "embeddings"]))
        assert (found["embeddings"][:, 0, 0].tolist(), found["lengths"].tolist()) == ([98, 99], [2, 1])


async def test_what_clients_of_kserve_send_for_http_is_taken() -> None:
    request = texts("a", outputs=["embeddings"])
    request.inputs[0].parameters["binary_data_size"].int64_param = 5
    request.outputs[0].parameters["binary_data"].bool_param = True
    async with serving(engine()) as served:
        assert (await infer(served, request))["embeddings"].shape == (1, 3, 4)


async def test_metadata_names_the_tensors() -> None:
    async with serving(engine()) as served:
        server = await served.kserve.ServerMetadata(pb.ServerMetadataRequest())
        assert (server.name, server.extensions) == ("bilm-serve", [])
        model = await served.kserve.ModelMetadata(pb.ModelMetadataRequest(name="fake"))
        assert (model.name, model.versions) == ("fake", [served.embedder.model.version])
        assert {each.name: (each.datatype, list(each.shape)) for each in model.inputs} == {
            "text": ("BYTES", [-1]), "tokens": ("BYTES", [-1]), "lengths": ("INT32", [-1])
        }  # fmt: skip
        assert {each.name: (each.datatype, list(each.shape)) for each in model.outputs} == {
            "embeddings": ("FP32", [-1, 3, 4]),
            "lengths": ("INT32", [-1]),
            "tokens": ("BYTES", [-1]),
            "token_starts": ("INT32", [-1]),
            "token_ends": ("INT32", [-1]),
        }
        assert (model.properties["layer_count"], model.properties["tokenizer"]) == ("3", "whitespace")
        for request in (pb.ModelMetadataRequest(name="other"), pb.ModelMetadataRequest(version="0")):
            code, *_ = await refusal(served.kserve.ModelMetadata(request))
            assert code == ("NOT_FOUND" if request.name else "FAILED_PRECONDITION")


# ---- what is refused ----


def with_inputs(*inputs: Any, raw: tuple[bytes, ...] = ()) -> Request:
    return Request(inputs=inputs, raw_input_contents=raw)


def one_text(raw: bytes, *shape: int, datatype: str = "BYTES", **fields: Any) -> Request:
    return with_inputs(tensor("text", datatype, *shape, **fields), raw=(raw,))


def two_inputs(words: bytes, n_tokens: int, lengths: bytes, n_sentences: int) -> Request:
    return with_inputs(
        tensor("tokens", "BYTES", n_tokens), tensor("lengths", "INT32", n_sentences), raw=(words, lengths)
    )


A = raw_bytes("a")
TYPED_A = pb.InferTensorContents(bytes_contents=[b"a"])
MANY_PARAMETERS = Request(
    inputs=[tensor("text", "BYTES", 1)],
    raw_input_contents=[A],
    parameters=parameters(**dict.fromkeys("abcdefghijk", 1)),
)
BAD_REQUESTS: dict[str, tuple[Request, str, str]] = {
    # inputs
    "none": (Request(), MALFORMED, "inputs: expected text, or tokens and lengths; found none"),
    "unknown": (with_inputs(tensor("txt", "BYTES", 1), raw=(A,)), MALFORMED, "unknown name 'txt'"),
    "a long name": (with_inputs(tensor("x" * 99, "BYTES", 1), raw=(A,)), MALFORMED, "name of 99 characters"),
    "both kinds": (
        with_inputs(tensor("text", "BYTES", 1), tensor("tokens", "BYTES", 1), raw=(A, A)),
        MALFORMED,
        "found text, tokens",
    ),
    "tokens alone": (with_inputs(tensor("tokens", "BYTES", 1), raw=(A,)), MALFORMED, "found tokens"),
    "twice": (with_inputs(*[tensor("text", "BYTES", 1)] * 2, raw=(A, A)), MALFORMED, "text is there twice"),
    "three": (with_inputs(*[tensor("text", "BYTES", 1)] * 3, raw=(A,) * 3), MALFORMED, "found 3 inputs"),
    "datatype": (one_text(A, 1, datatype="FP32"), MALFORMED, "text: expected datatype BYTES, found 'FP32'"),
    "no axis": (one_text(A), MALFORMED, "text: expected a shape of 1 axis, found 0"),
    "two axes": (one_text(A, 1, 1), MALFORMED, "text: expected a shape of 1 axis, found 2"),
    "negative": (one_text(A, -1), MALFORMED, "expected a shape from [0], found [-1]"),
    "input's parameter": (
        one_text(A, 1, parameters=parameters(shared_memory_region="x")),
        MALFORMED,
        "text: parameters: unknown name 'shared_memory_region'",
    ),
    # contents
    "raw and typed": (one_text(A, 1, contents=TYPED_A), MALFORMED, "raw_input_contents or contents, found both"),
    "raw for one of two": (
        with_inputs(tensor("tokens", "BYTES", 1), tensor("lengths", "INT32", 1), raw=(A,)),
        MALFORMED,
        "one for each of 2 inputs; found 1",
    ),
    "no contents": (with_inputs(tensor("text", "BYTES", 1)), MALFORMED, "the 1 elements of its shape, found 0"),
    "another field": (
        with_inputs(tensor("text", "BYTES", 1, contents=pb.InferTensorContents(int_contents=[1]))),
        MALFORMED,
        "text: expected bytes_contents, found int_contents",
    ),
    "too few": (one_text(A, 2), MALFORMED, "text: expected 2 elements"),
    "too many": (one_text(A + A, 1), MALFORMED, "text: expected 1 elements"),
    "cut in a length": (one_text(A + b"\1\0", 2), MALFORMED, "text: expected 2 elements"),
    "beyond the end": (one_text(b"\xff\xff\xff\x7fa", 1), MALFORMED, "text: expected 1 elements"),
    "not UTF-8": (one_text(raw_bytes("a", b"\xff"), 2), MALFORMED, "text: element 1 isn't UTF-8"),
    "typed and not UTF-8": (
        with_inputs(tensor("text", "BYTES", 1, contents=pb.InferTensorContents(bytes_contents=[b"\xff"]))),
        MALFORMED,
        "text: element 0 isn't UTF-8",
    ),
    "lengths' bytes": (two_inputs(A, 1, b"\1", 1), MALFORMED, "lengths: expected 4 raw bytes, found 1"),
    "lengths' sum": (two_inputs(A, 1, raw_numbers(2), 1), MALFORMED, "lengths: expected a sum of 1"),
    "a negative length": (two_inputs(A, 1, raw_numbers(2, -1), 2), MALFORMED, "expected numbers from 0, found -1"),
    # limits
    "empty batch": (texts(), Reason.SENTENCES_MISSING, "sentences: found 0 (expected 1 to 8)"),
    "empty batch of tokens": (tokens(), Reason.SENTENCES_MISSING, "sentences: found 0 (expected 1 to 8)"),
    "sentences": (texts(*["a"] * 9), Reason.TOO_MANY_SENTENCES, "sentences: found 9 (expected 1 to 8)"),
    "a shape alone": (one_text(A, 2**62), Reason.TOO_MANY_SENTENCES, "(expected 1 to 8)"),
    "tokens": (tokens(["a"] * 999, ["a"] * 2), Reason.TOO_MANY_TOKENS, "1001 tokens are more than 1000"),
    "a long sentence": (tokens(["a"], ["a"] * 501), Reason.SENTENCE_TOO_LONG, "sentence 1: 501 tokens"),
    "an empty token": (tokens(["a"], ["b", ""]), Reason.TOKEN_EMPTY, "sentence 1: token 1 is empty"),
    "pooled nothing": (texts("a", "", pooling="mean"), Reason.POOLING_EMPTY, "sentence 1:"),
    "fails by itself": (tokens(["a"], ["poison"]), Reason.INTERNAL, "sentence 1: internal error"),
    # outputs
    "output": (texts("a", outputs=["embedding"]), MALFORMED, "outputs: unknown name 'embedding' (expected some of"),
    "output twice": (texts("a", outputs=["tokens"] * 2), MALFORMED, "expected each name once"),
    "places of tokens": (tokens(["a"], outputs=["token_ends"]), MALFORMED, "need the input text"),
    "classification": (
        Request(
            inputs=[tensor("text", "BYTES", 1)],
            raw_input_contents=[A],
            outputs=[{"name": "tokens", "parameters": parameters(classification=3)}],
        ),
        MALFORMED,
        "tokens: parameters: unknown name 'classification' (expected some of binary_data)",
    ),
    # parameters
    "parameter": (texts("a", poling="mean"), MALFORMED, "parameters: unknown name 'poling' (expected some of layers"),
    "many": (MANY_PARAMETERS, MALFORMED, "parameters: 11 names"),
    "type": (texts("a", layers=1), MALFORMED, "layers: expected string_param, found int64_param"),
    "truth": (texts("a", l2_normalize="yes"), MALFORMED, "l2_normalize: expected bool_param, found string_param"),
    "no value": (
        Request(
            inputs=[tensor("text", "BYTES", 1)], raw_input_contents=[A], parameters={"layers": pb.InferParameter()}
        ),
        MALFORMED,
        "layers: expected string_param, found no value",
    ),
    "layers": (texts("a", layers="last"), Reason.LAYERS_INVALID, "'last' (expected one of all, top, average, mix)"),
    "pooling": (texts("a", pooling="sum"), Reason.POOLING_INVALID, "'sum' (expected one of none, mean, max)"),
    "BF16": (texts("a", data_type="BF16"), Reason.DATA_TYPE_INVALID, "'BF16' (expected one of FP32, FP16)"),
    "mix without weights": (texts("a", layers="mix"), Reason.MIX_INVALID, "expected 3 numbers"),
    "two weights": (texts("a", layers="mix", mix_weights="1,2"), Reason.MIX_INVALID, "expected 3 numbers"),
    "words": (texts("a", layers="mix", mix_weights="a,b,c"), Reason.MIX_INVALID, "found something else"),
    "Python's digits": (texts("a", layers="mix", mix_weights="1,1_0,2"), Reason.MIX_INVALID, "found something else"),
    "not a number": (texts("a", layers="mix", mix_weights="1,nan,2"), Reason.MIX_INVALID, "found something else"),
    "not finite": (texts("a", layers="mix", mix_weights="1,1e39,2"), Reason.MIX_INVALID, "finite"),
    "weights alone": (texts("a", mix_weights="1,2,3"), Reason.MIX_INVALID, "only goes with layers = mix"),
    "negative timeout": (texts("a", timeout=-1), MALFORMED, "timeout: expected a number from 0, found -1"),
    "priority's type": (
        texts("a", priority=True),
        MALFORMED,
        "priority: expected string_param or int64_param or uint64_param",
    ),
    "priority": (texts("a", priority="high"), Reason.PRIORITY_INVALID, "'high' (expected one of interactive, batch)"),
    "negative priority": (texts("a", priority=-1), MALFORMED, "priority: expected a number from 0, found -1"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_a_bad_request_is_refused_with_what_was_expected_and_found(case: str) -> None:
    request, expected, words = BAD_REQUESTS[case]
    async with serving(engine()) as served:
        code, reason, message, pushback = await refusal(served.kserve.ModelInfer(request))
        assert (code, reason, pushback) == (
            "INTERNAL" if case == "fails by itself" else "INVALID_ARGUMENT", expected, None
        )  # fmt: skip
        assert words in message
        (call,) = served.ended.records
        assert (call.model, call.reason) == ("fake", expected)
        assert (await infer(served, texts("a")))["lengths"].tolist() == [1]


async def test_a_sentence_that_is_refused_keeps_the_others_from_being_computed() -> None:
    computing = engine()
    async with serving(computing) as served:
        await refusal(served.kserve.ModelInfer(tokens(["a"], [""])))
        assert computing.groups == []


@pytest.mark.parametrize(
    ("request_", "expected", "label"),
    [
        (Request(model_name="other"), ("NOT_FOUND", "MODEL_NOT_FOUND"), ""),
        (Request(model_version="0"), ("FAILED_PRECONDITION", "MODEL_VERSION_MISMATCH"), "fake"),
    ],
)
async def test_another_model_is_refused_before_anything_is_read(
    request_: Request, expected: tuple[str, str], label: str
) -> None:
    async with serving(engine()) as served:
        code, reason, message, _ = await refusal(served.kserve.ModelInfer(request_))
        assert (code, reason) == expected
        assert "served here" in message
        assert [call.model for call in served.ended.records] == [label]


async def test_a_response_that_does_not_fit_is_refused() -> None:
    async with serving(engine(), response_bytes=3000) as served:
        code, reason, _, pushback = await refusal(served.kserve.ModelInfer(tokens(["a"] * 60)))
        assert (code, reason, pushback) == ("RESOURCE_EXHAUSTED", "RESPONSE_TOO_LARGE", "-1")
        code, reason, *_ = await refusal(served.kserve.ModelInfer(tokens(["a"], id="x" * 1000)))
        assert reason == "RESPONSE_TOO_LARGE"  # the name comes back with it


@pytest.mark.parametrize("pooling", ["none", "mean"])
@pytest.mark.parametrize("n_tokens", [[1], [9, 0, 1], [0], [300] * 8])
def test_no_response_is_larger_than_its_bound(n_tokens: list[int], pooling: Pooling) -> None:
    names = ["embeddings", "lengths", "tokens", "token_starts", "token_ends"]
    output = OutputSpec(Selection("all", pooling))
    sentences = [Sentence(Call(), None, output, tokens=("é" * 40,) * n) for n in n_tokens]
    for sentence in sentences:
        sentence.starts = sentence.ends = range(len(sentence.tokens))
    shapes = [(3, 4) if output.pooled else (3, n, 4) for n in n_tokens]
    results = [Result(np.ones(shape, "<f4"), None, 1e6, 1e6) for shape in shapes]
    for request_id in ("", "é" * 5000):
        wire = TensorFormat(fake_model(), request_id, names, len(sentences))
        bound = sum(map(wire.overhead_bytes, sentences)) + sum(result.vectors.nbytes for result in results)
        data = wire.build(sentences, results)
        assert len(data) <= bound
        found = arrays(pb.ModelInferResponse.FromString(data))
        assert found["embeddings"].shape == (len(sentences) if output.pooled else sum(n_tokens), 3, 4)
        assert found["token_ends"].tolist() == [place for n in n_tokens for place in range(n)]


async def test_overload_is_refused_with_a_pushback() -> None:
    computing = FakeEngine[Sentence](Capacity(1, 100))
    computing.go_on.clear()
    async with serving(computing, max_tokens=10) as served:
        first = asyncio.ensure_future(served.kserve.ModelInfer(tokens(["a"] * 8)))
        await until(lambda: served.embedder.admission.used_tokens == 8)
        code, reason, _, pushback = await refusal(served.kserve.ModelInfer(tokens(["a"] * 3)))
        assert (code, reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        assert int(pushback or 0) > 0
        computing.go_on.set()
        assert arrays(await first)["lengths"].tolist() == [8]


async def test_a_call_that_is_cancelled_leaves_nothing() -> None:
    computing = FakeEngine[Sentence](Capacity(1, 100))
    computing.go_on.clear()
    async with serving(computing) as served:
        call = served.kserve.ModelInfer(tokens(["a"], ["b"]))
        pending = asyncio.ensure_future(call)
        await until(computing.computing.is_set)
        pending.cancel()
        await until(lambda: served.embedder.admission.used_tokens == 0)
        computing.go_on.set()
        await until(lambda: served.embedder.idle and computing.in_flight == 0)
        await until(lambda: bool(served.ended.records))
        assert served.ended.records[0].code is Code.CANCELLED


async def test_a_timeout_in_microseconds_is_a_deadline() -> None:
    computing = FakeEngine[Sentence](Capacity(1, 100))
    computing.go_on.clear()
    async with serving(computing) as served:
        first = asyncio.ensure_future(served.kserve.ModelInfer(tokens(["a"])))
        await until(computing.computing.is_set)
        late = asyncio.ensure_future(refusal(served.kserve.ModelInfer(tokens(["b"], timeout=1))))
        await until(lambda: worker_of(served.embedder).waiting > 0 or late.done())
        computing.go_on.set()
        assert (await late)[:2] == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert arrays(await first)["lengths"].tolist() == [1]


async def test_a_large_request_is_read_in_a_thread() -> None:
    async with serving(engine(), sentence_tokens=900) as served:
        words = [f"{'é' * 40}{i}" for i in range(600)]  # 48 KiB
        found = await infer(served, tokens(words[:1], words[1:], layers="top", outputs=["tokens"]))
        assert [token.decode() for token in found["tokens"]] == words
