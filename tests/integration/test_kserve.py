"""The Open Inference Protocol on a real model: the bits of `Embed`, and everything that a call of `Embed` has, too."""

import asyncio
import logging
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from bilm_api.inference import open_inference_pb2 as pb
from bilm_api.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from bilm_api.v1 import embed_pb2
from bilm_server.app import build_server
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.preflight import plan_serving
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.kserve.methods import MODEL_METHODS, OPEN_METHODS
from bilm_server.protocols.kserve.readiness import ReadinessService
from bilm_server.served_model import ServedModel, load_served_model
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.integration_support import health_stub, options
from tests.integration.integration_support import tokens as embed_tokens
from tests.support.processes import wait_until
from tests.support.server_processes import ProcessServer
from tests.support.servers import LoopServer, with_defaults
from tests.support.tensors import arrays, texts, tokens

SERVICE = "inference.GRPCInferenceService"
SENTENCES = [["The", "play", "was", "a", "success", "."], [], ["one"], ["naïve", "w" * 60, "x"] * 5]
TEXTS = ["Naïve “quotes”, don't they?", "", "The play was a success."]
TOKEN, OTHER_TOKEN = "a-token-of-sixteen", "another-of-sixteen"
MARK = ("x-bilm-no-log", "1")

LAYERS = {
    "all": embed_pb2.LAYERS_ALL,
    "top": embed_pb2.LAYERS_TOP,
    "average": embed_pb2.LAYERS_AVERAGE,
    "mix": embed_pb2.LAYERS_MIX,
}
POOLINGS = {"none": embed_pb2.POOLING_NONE, "mean": embed_pb2.POOLING_MEAN, "max": embed_pb2.POOLING_MAX}
DATA_TYPES = {"FP32": (embed_pb2.DATA_TYPE_FLOAT32, "<f4"), "FP16": (embed_pb2.DATA_TYPE_FLOAT16, "<f2")}
MIX = embed_pb2.ScalarMix(weights=[0.25, -1, 2], gamma=0.5, layer_norm=True)
MIX_PARAMETERS: dict[str, Any] = {
    "layers": "mix", "mix_weights": "0.25,-1,2", "mix_gamma": 0.5, "mix_layer_norm": True
}  # fmt: skip


def stub(server: LoopServer) -> Any:
    return GRPCInferenceServiceStub(server.channel())


def expected(response: embed_pb2.EmbedResponse, dtype: str) -> list[Any]:
    """Return what `Embed` has returned, a sentence's tokens first as the other protocol has them."""
    tensors = [result.embedding.tensor for result in response.results]
    found = [np.frombuffer(each.data, dtype).reshape(tuple(each.shape)) for each in tensors]
    return [each.swapaxes(0, 1) if each.ndim == 3 else each for each in found]


def refused(method: Any, request: Any, **how: Any) -> tuple[str, str]:
    """Return the status and the reason that a call is refused with."""
    with pytest.raises(grpc.RpcError) as error:
        method(request, **how)
    metadata: dict[str, Any] = {item.key: item.value for item in error.value.trailing_metadata()}
    (detail,) = status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return error.value.code().name, info.reason


# ---- bits ----


@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layers", LAYERS)
def test_the_bits_are_those_of_embed(
    server: LoopServer, layers: str, pooling: str, l2_normalize: bool, data_type: str
) -> None:
    ours, dtype = DATA_TYPES[data_type]
    sentences = SENTENCES if pooling == "none" else [sentence for sentence in SENTENCES if sentence]
    chosen = options(
        layers=LAYERS[layers],
        mix=MIX if layers == "mix" else None,
        pooling=POOLINGS[pooling],
        l2_normalize=l2_normalize,
        data_type=ours,
    )
    request = embed_pb2.EmbedRequest(options=chosen, sentences=[embed_tokens(*words) for words in sentences])
    parts = expected(server.stub().Embed(request), dtype)
    given: dict[str, Any] = {"pooling": pooling, "l2_normalize": l2_normalize, "data_type": data_type}
    given |= MIX_PARAMETERS if layers == "mix" else {"layers": layers}
    found = arrays(stub(server).ModelInfer(tokens(*sentences, **given)))
    whole = np.concatenate(parts) if pooling == "none" else np.stack(parts)
    assert found["embeddings"].dtype == dtype
    assert np.array_equal(found["embeddings"], whole)
    if pooling == "none":
        assert found["lengths"].tolist() == [len(words) for words in sentences]


def test_texts_are_tokenised_as_embed_tokenises_them(server: LoopServer) -> None:
    response = server.stub().Embed(embed_pb2.EmbedRequest(sentences=[embed_pb2.Sentence(text=text) for text in TEXTS]))
    names = ["embeddings", "tokens", "token_starts", "token_ends", "lengths"]
    found = arrays(stub(server).ModelInfer(texts(*TEXTS, outputs=names)))
    embeddings = [result.embedding for result in response.results]
    assert np.array_equal(found["embeddings"], np.concatenate(expected(response, "<f4")))
    assert [token.decode() for token in found["tokens"]] == [token for each in embeddings for token in each.tokens]
    assert found["token_starts"].tolist() == [place for each in embeddings for place in each.token_starts]
    assert found["token_ends"].tolist() == [place for each in embeddings for place in each.token_ends]
    assert found["lengths"].tolist() == [len(each.tokens) for each in embeddings]


def test_the_largest_call_has_the_bits_of_each_sentence_alone(server: LoopServer) -> None:
    sentences = [[f"w{i}", *["x"] * (i % 14), "y"] for i in range(1024)]
    found = arrays(stub(server).ModelInfer(tokens(*sentences)))
    ends = np.cumsum(found["lengths"])
    for i in (0, 13, 511, 1023):
        alone = arrays(stub(server).ModelInfer(tokens(sentences[i])))["embeddings"]
        assert np.array_equal(found["embeddings"][ends[i] - len(sentences[i]) : ends[i]], alone)


# ---- what is open, and when ----


def test_three_methods_need_no_token(start: Callable[..., LoopServer], tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text(f"team-a {TOKEN}\n", encoding="utf-8")
    token_file.chmod(0o600)
    server = start("--token-file", str(token_file))
    inference, metadata = stub(server), (("authorization", f"Bearer {TOKEN}"),)
    assert inference.ServerLive(pb.ServerLiveRequest()).live
    assert inference.ServerReady(pb.ServerReadyRequest()).ready
    assert inference.ModelReady(pb.ModelReadyRequest(name="random-tiny", version=server.model.version)).ready
    guarded: list[tuple[Any, Any]] = [
        (inference.ServerMetadata, pb.ServerMetadataRequest()),
        (inference.ModelMetadata, pb.ModelMetadataRequest()),
        (inference.ModelInfer, texts("a")),
    ]
    for method, request in guarded:
        for wrong in ((), (("authorization", f"Bearer {OTHER_TOKEN}"),)):
            assert refused(method, request, metadata=wrong) == (
                "UNAUTHENTICATED", "UNAUTHENTICATED"
            )  # fmt: skip
        assert method(request, metadata=metadata).ByteSize() > 0
    channel: Any = server.channel()
    for path in (f"/{SERVICE}/ServerLive/Check", f"/{SERVICE}/ServerLived", f"/{SERVICE}", f"//{SERVICE}/ServerLive"):
        assert refused(channel.unary_unary(path), b"")[0] == "UNAUTHENTICATED"


@pytest.mark.parametrize("request_", [pb.ModelReadyRequest(name="other"), pb.ModelReadyRequest(version="1")])
def test_another_model_is_not_ready(server: LoopServer, request_: pb.ModelReadyRequest) -> None:
    assert not stub(server).ModelReady(request_).ready


async def test_readiness_is_that_of_health() -> None:
    health, nothing = HealthReporter("a.Service"), Any
    service = ReadinessService(health, lambda name, version: (name, version) == ("a", "1"))
    context: Any = nothing

    async def ready(name: str = "a") -> tuple[bool, bool, bool]:
        model = await service.ModelReady(pb.ModelReadyRequest(name=name, version="1"), context)
        server = await service.ServerReady(pb.ServerReadyRequest(), context)
        return (await service.ServerLive(pb.ServerLiveRequest(), context)).live, server.ready, model.ready

    assert await ready() == (True, False, False)
    health.set({"a": True})
    assert await ready() == (True, True, True)
    assert await ready("b") == (True, True, False)
    health.drain()
    assert await ready() == (True, False, False)


async def test_while_the_model_loads_readiness_is_answered_and_calls_are_sent_back() -> None:
    config, may_load = load_config(with_defaults(())), asyncio.Event()
    model, loop = load_served_model(config), asyncio.get_running_loop()

    def load(_: ServerConfig) -> ServedModel:
        asyncio.run_coroutine_threadsafe(may_load.wait(), loop).result(60)
        return model

    server = build_server(config, plan_serving(config), load)
    await server.start()
    loading = asyncio.create_task(server.load())
    try:
        async with grpc.aio.insecure_channel(server.target) as channel:
            inference: Any = GRPCInferenceServiceStub(channel)
            assert (await inference.ServerLive(pb.ServerLiveRequest())).live
            assert not (await inference.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await inference.ModelReady(pb.ModelReadyRequest(name=model.name))).ready
            for call in (
                inference.ServerMetadata(pb.ServerMetadataRequest()),
                inference.ModelMetadata(pb.ModelMetadataRequest()),
                inference.ModelInfer(texts("a")),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                trailing: Any = dict(error.value.trailing_metadata())
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
                assert b"MODEL_LOADING" in trailing["grpc-status-details-bin"]
                assert trailing["grpc-retry-pushback-ms"] == "1000"
            may_load.set()
            await loading
            assert (await inference.ModelReady(pb.ModelReadyRequest(name=model.name))).ready
            assert arrays(await inference.ModelInfer(texts("a")))["lengths"].tolist() == [1]
    finally:
        may_load.set()
        await loading
        await server.stop()


def test_without_the_flag_there_is_no_such_service(start: Callable[..., LoopServer]) -> None:
    server = start("--no-kserve")
    channel: Any = server.channel()
    for method in (*OPEN_METHODS, *MODEL_METHODS):
        assert refused(channel.unary_unary(f"/{SERVICE}/{method}"), b"") == (
            "UNIMPLEMENTED", "METHOD_NOT_FOUND"
        )  # fmt: skip


@pytest.mark.parametrize("flag", ["--kserve", "--no-kserve"])
def test_reflection_shows_the_service_where_it_is(start: Callable[..., LoopServer], flag: str) -> None:
    channel = start("--reflection", flag).channel()
    reflect: Any = reflection_pb2_grpc.ServerReflectionStub
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="bilm_api.v1.EmbedService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, ours, theirs = reflect(channel).ServerReflectionInfo(iter(questions))
    names = {service.name for service in listed.list_services_response.service}
    assert (SERVICE in names) == (flag == "--kserve")
    assert len(ours.file_descriptor_response.file_descriptor_proto) > 1  # with what it imports
    assert theirs.HasField("file_descriptor_response") == (flag == "--kserve")


def test_a_drain_lets_a_call_finish_and_readiness_says_so() -> None:
    with ProcessServer() as server, grpc.insecure_channel(server.target) as channel:
        inference: Any = GRPCInferenceServiceStub(channel)
        in_flight = inference.ModelInfer.future(tokens(["w"] * 8000, ["b"], layers="top"))
        updates = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(updates).status == health_pb2.HealthCheckResponse.SERVING
        assert inference.ServerReady(pb.ServerReadyRequest()).ready
        server.send_signal(signal.SIGTERM)
        assert next(updates).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert arrays(in_flight.result(60))["lengths"].tolist() == [8000, 1]
        updates.cancel()
        assert server.wait() == 0


# ---- what every call passes through ----


@pytest.mark.parametrize("method", [*OPEN_METHODS, *MODEL_METHODS])
def test_malformed_frames_are_the_callers_fault(server: LoopServer, method: str) -> None:
    channel: Any = server.channel()
    for frame in (b"\xff\xff\xff", b"\n\x03\xff\xfe\xfd"):
        if frame.startswith(b"\n") and method.startswith("Server"):  # these have no field that could be bad
            continue
        assert refused(channel.unary_unary(f"/{SERVICE}/{method}"), frame) == (
            "INVALID_ARGUMENT", "MALFORMED_REQUEST"
        )  # fmt: skip


def test_a_message_over_the_limit_never_gets_in(server: LoopServer) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub(server).ModelInfer(texts("x" * (4 * 2**20)))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_deadline_of_a_call_ends_it(start: Callable[..., LoopServer]) -> None:
    server = start()
    with pytest.raises(grpc.RpcError) as error:
        stub(server).ModelInfer(tokens(["a"]), timeout=0)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[dict[str, Any]]]:
    """Waits for so many lines of the access log; a call's line follows its status."""
    caplog.set_level(logging.INFO)

    def found() -> list[dict[str, Any]]:
        records = [each for each in caplog.records if each.name == "bilm_server.observability.access_log"]
        return [vars(each)["fields"] for each in records]

    def waited(n: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(found()) >= n, f"{n} lines")
        return found()

    return waited


def test_callers_have_their_rights_limits_and_lines_in_the_log(
    start: Callable[..., LoopServer], tmp_path: Path, lines: Callable[[int], list[dict[str, Any]]]
) -> None:
    token_file, callers = tmp_path / "tokens", tmp_path / "callers.toml"
    token_file.write_text(f"team-a {TOKEN}\nteam-b {OTHER_TOKEN}\n", encoding="utf-8")
    token_file.chmod(0o600)
    callers.write_text('[[callers]]\nname = "team-b"\nrights = ["no-log"]\n', encoding="utf-8")
    limits = ("--caller-tokens-per-s", "1", "--max-tokens-per-request", "100")
    server = start("--token-file", str(token_file), "--config", str(callers), *limits)
    inference, own = stub(server), (("authorization", f"Bearer {TOKEN}"),)
    others = (("authorization", f"Bearer {OTHER_TOKEN}"),)
    for _ in range(2):
        inference.ModelInfer(tokens(["a"] * 90, layers="top"), metadata=own)
    again = refused(inference.ModelInfer, tokens(["a"] * 90), metadata=own)
    assert again == ("RESOURCE_EXHAUSTED", "CALLER_LIMIT")
    inference.ModelInfer(tokens(["a", "b"], ["c"], pooling="mean"), metadata=(*others, MARK))
    inference.ModelInfer(tokens(["a", "b"], ["c"]), metadata=(*others, ("x-request-id", "r-1")))
    seen = lines(4)
    assert [(line["method"], line["code"], line.get("caller"), line.get("reason")) for line in seen] == [
        *((f"{SERVICE}/ModelInfer", "OK", "team-a", None),) * 2,
        (f"{SERVICE}/ModelInfer", "RESOURCE_EXHAUSTED", "team-a", "CALLER_LIMIT"),
        (f"{SERVICE}/ModelInfer", "OK", "team-b", None),
    ]
    assert (seen[3]["sentences"], seen[3]["tokens"], seen[3]["request_id"]) == (2, 3, "r-1")


def test_calls_are_counted_from_the_start(start: Callable[..., LoopServer], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "bilm_server.lifecycle")
    server = start("--metrics-listen", "127.0.0.1:0")
    (line,) = (line for record in caplog.records if (line := record.getMessage()).startswith("metrics on "))

    def counted() -> list[float | None]:
        with urllib.request.urlopen(line.removeprefix("metrics on ")) as page:
            families = text_string_to_metric_families(page.read().decode())
        found = {
            (each.name, *sorted(each.labels.items())): each.value for family in families for each in family.samples
        }
        method, model = ("method", f"{SERVICE}/ModelInfer"), ("model", "random-tiny")
        return [
            found.get(("bilm_requests_total", ("code", "OK"), method, model)),
            found.get(("bilm_refusals_total", method, model, ("reason", "OVERLOADED"))),
            found.get(("bilm_refusals_total", method, model, ("reason", "LAYERS_INVALID"))),
            found.get(("bilm_tokens_total", model)),
        ]

    assert counted() == [0, 0, None, 0]
    stub(server).ModelInfer(tokens(["a", "b"], ["c"]))
    refused(stub(server).ModelInfer, texts("a", layers="last"))
    wait_until(lambda: counted() == [1, 0, 1, 3], "both calls are counted")
