"""`EmbedService` on a fake engine, through gRPC."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import numpy as np
import pytest
from bilm_api.constants import PUSHBACK_KEY, STATUS_DETAILS_KEY, Priority, Reason
from bilm_api.v1 import embed_pb2
from bilm_model.engine.types import Capacity
from bilm_server.config import CallerSettings
from bilm_server.embedding.admission import Cost
from bilm_server.errors import Code
from bilm_server.inference.types import Sentence
from google.rpc import error_details_pb2, status_pb2

from tests.support.embedders import LIMITS, until, worker_of
from tests.support.fake_engine import FakeEngine
from tests.support.served import serving, text, tokens

Request = embed_pb2.EmbedRequest
LARGE_MESSAGES = (("grpc.max_receive_message_length", 20 * 2**20),)


def engine() -> FakeEngine[Sentence]:
    return FakeEngine()


def reason_of(status: status_pb2.Status) -> str:
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    reason: str = info.reason
    return reason


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, str | None]:
    """Return the status, the reason and the pushback that a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    trailing = dict(iter(error.value.trailing_metadata() or ()))
    details = trailing[STATUS_DETAILS_KEY]
    assert isinstance(details, bytes)
    pushback = trailing.get(PUSHBACK_KEY)
    assert not isinstance(pushback, bytes)
    return error.value.code(), reason_of(status_pb2.Status.FromString(details)), pushback


# ---- Embed ----


async def test_text_and_tokens_are_embedded_in_order() -> None:
    async with serving(engine()) as served:
        response = await served.stub.Embed(Request(sentences=[text("a b"), tokens("c"), tokens()]))
        first, second, third = (result.embedding for result in response.results)
        assert (list(first.tokens), list(first.token_starts), list(first.token_ends)) == (["a", "b"], [0, 2], [1, 3])
        assert list(first.tensor.shape) == [3, 2, 4]
        assert np.frombuffer(first.tensor.data, "<f4").reshape(3, 2, 4)[0, :, 0].tolist() == [97, 98]
        assert (list(second.tokens), list(second.token_starts)) == (["c"], [])
        assert list(third.tensor.shape) == [3, 0, 4]
        assert (response.usage.tokens, response.usage.model_version) == (3, served.embedder.model.version)
        (call,) = served.ended.records
        assert (call.method, call.model, call.code, call.reason) == ("Embed", "fake", Code.OK, "")
        assert (call.sentences, call.failed_sentences, call.tokens) == (3, 0, 3)


async def test_a_bad_sentence_costs_the_others_nothing() -> None:
    async with serving(engine()) as served:
        sentences = [tokens("a"), embed_pb2.Sentence(), tokens("poison"), tokens("b", state=b"?"), tokens("c")]
        response = await served.stub.Embed(Request(sentences=sentences))
        assert [result.WhichOneof("outcome") for result in response.results] == [
            "embedding", "error", "error", "error", "embedding",
        ]  # fmt: skip
        assert [reason_of(response.results[index].error) for index in (1, 2, 3)] == [
            Reason.SENTENCE_MISSING, Reason.INTERNAL, Reason.STATE_INVALID,
        ]  # fmt: skip
        assert served.ended.records[0].failed_sentences == 3


async def test_a_state_comes_back_and_continues() -> None:
    async with serving(engine()) as served:
        first = await served.stub.Embed(Request(sentences=[tokens("a", "b", return_state=True)]))
        state = first.results[0].embedding.state
        second = await served.stub.Embed(Request(sentences=[tokens("a", state=state)]))
        assert np.frombuffer(second.results[0].embedding.tensor.data, "<f4")[0] == ord("a") + 2
        assert not second.results[0].embedding.state


async def test_options_reach_the_engine() -> None:
    options = embed_pb2.EmbedOptions(
        layers=embed_pb2.LAYERS_TOP,
        pooling=embed_pb2.POOLING_MEAN,
        data_type=embed_pb2.DATA_TYPE_FLOAT16,
        omit_tokens=True,
    )
    async with serving(engine()) as served:
        response = await served.stub.Embed(Request(options=options, sentences=[tokens("a", "c")]))
        embedding = response.results[0].embedding
        assert list(embedding.tensor.shape) == [4]
        assert np.frombuffer(embedding.tensor.data, "<f2").tolist() == [98] * 4
        assert not embedding.tokens


@pytest.mark.parametrize(
    ("request_", "code", "reason", "pushback"),
    [
        (Request(), "INVALID_ARGUMENT", Reason.SENTENCES_MISSING, None),
        (Request(sentences=[tokens("a")] * 9), "INVALID_ARGUMENT", Reason.TOO_MANY_SENTENCES, None),
        (Request(sentences=[tokens(*["a"] * 400)] * 3), "INVALID_ARGUMENT", Reason.TOO_MANY_TOKENS, None),
        (Request(sentences=[tokens("a")], model="other"), "NOT_FOUND", Reason.MODEL_NOT_FOUND, None),
        (
            Request(sentences=[tokens("a")], expected_model_version="other"),
            "FAILED_PRECONDITION", Reason.MODEL_VERSION_MISMATCH, None,
        ),
        (
            Request(sentences=[tokens("a")], options=embed_pb2.EmbedOptions(pooling=7)),  # type: ignore[arg-type]
            "INVALID_ARGUMENT", Reason.POOLING_INVALID, None,
        ),
        (Request(sentences=[tokens(*["a"] * 30)]), "RESOURCE_EXHAUSTED", Reason.RESPONSE_TOO_LARGE, "-1"),
        # … and of several things that are wrong the first one is named, in the order in which they are checked
        (Request(model="other", options=embed_pb2.EmbedOptions(layers=9)), "NOT_FOUND", Reason.MODEL_NOT_FOUND, None),  # type: ignore[arg-type]
        (Request(options=embed_pb2.EmbedOptions(layers=9)), "INVALID_ARGUMENT", Reason.SENTENCES_MISSING, None),  # type: ignore[arg-type]
        (
            Request(sentences=[tokens(*["a"] * 400)] * 3, options=embed_pb2.EmbedOptions(layers=9)),  # type: ignore[arg-type]
            "INVALID_ARGUMENT", Reason.LAYERS_INVALID, None,
        ),
    ],
)  # fmt: skip
async def test_bad_calls_are_refused_as_a_whole(
    request_: embed_pb2.EmbedRequest, code: str, reason: Reason, pushback: str | None
) -> None:
    async with serving(engine(), response_bytes=1000) as served:
        found = await refusal(served.stub.Embed(request_))
        assert found == (grpc.StatusCode[code], reason, pushback)
        (call,) = served.ended.records
        assert (call.code, call.reason, call.sentences) == (Code[code], reason, 0)


async def test_a_call_that_finds_no_room_is_told_when_to_come_back() -> None:
    async with serving(engine(), max_tokens=10) as served:
        with served.embedder.admission.reserve(Cost(10, 0), lambda: 1):
            code, reason, pushback = await refusal(served.stub.Embed(Request(sentences=[tokens("a")])))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
        assert pushback is not None
        assert 20 <= int(pushback) <= 10_000


async def test_a_failing_engine_is_unavailable() -> None:
    fails = engine()
    async with serving(fails) as served:
        fails.broken = 1
        code, reason, _ = await refusal(served.stub.Embed(Request(sentences=[tokens("a"), tokens("b")])))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, Reason.MODEL_FAILING)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_what_nothing_waits_for_is_not_computed(how: str) -> None:
    slow: FakeEngine[Sentence] = FakeEngine(Capacity(1, 100))
    async with serving(slow) as served:
        slow.go_on.clear()
        first = served.stub.Embed(Request(sentences=[tokens("a")]))
        await until(lambda: worker_of(served.embedder).in_flight == 1)
        doomed = served.stub.Embed(
            Request(sentences=[tokens("b"), tokens("c")]), timeout=0.05 if how == "deadline" else None
        )
        if how == "cancel":
            await until(lambda: worker_of(served.embedder).waiting == 2)
            doomed.cancel()
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await doomed
        await until(lambda: worker_of(served.embedder).pending == 1)
        slow.go_on.set()
        await first
        assert slow.stats.steps == 1
        await until(lambda: len(served.ended.records) == 2)
        codes = {call.code for call in served.ended.records}
        assert codes == {Code.OK, Code.CANCELLED if how == "cancel" else Code.DEADLINE_EXCEEDED}


async def test_a_large_response_arrives_whole() -> None:
    async with serving(engine(), options=LARGE_MESSAGES) as served:
        response = await served.stub.Embed(Request(sentences=[tokens(*["a"] * 400)] * 2))
        assert [len(result.embedding.tokens) for result in response.results] == [400, 400]
        assert response.results[1].embedding.tensor.data == np.full((3, 400, 4), 97, "<f4").tobytes()


@pytest.mark.parametrize(
    ("asked", "ceiling", "expected"),
    [
        (embed_pb2.PRIORITY_UNSPECIFIED, Priority.INTERACTIVE, Priority.INTERACTIVE),
        (embed_pb2.PRIORITY_INTERACTIVE, Priority.INTERACTIVE, Priority.INTERACTIVE),
        (embed_pb2.PRIORITY_BATCH, Priority.INTERACTIVE, Priority.BATCH),
        (embed_pb2.PRIORITY_INTERACTIVE, Priority.BATCH, Priority.BATCH),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_sentences_have_the_priority_of_their_call_within_its_callers_ceiling(
    asked: embed_pb2.Priority, ceiling: Priority, expected: Priority, stream: bool
) -> None:
    held: FakeEngine[Sentence] = FakeEngine()
    callers = [CallerSettings(name="anybody", max_priority=ceiling)]
    async with serving(held, callers=callers) as served:
        held.go_on.clear()
        if stream:
            call = served.stub.EmbedStream(messages(tokens("a"), priority=asked))
        else:
            call = served.stub.Embed(Request(sentences=[tokens("a")], priority=asked))
        worker, embedder = worker_of(served.embedder), served.embedder
        await until(lambda: worker.in_flight == 1)
        assert [worker.rows_of(priority) for priority in Priority] == [
            int(priority is expected) for priority in Priority
        ]
        batch_tokens = embedder.admission.batch_tokens + embedder.stream_admission.batch_tokens
        assert batch_tokens == (expected is Priority.BATCH)
        held.go_on.set()
        found = [each async for each in call] if stream else [await call]
        assert len(found) == 1
        await until(lambda: bool(served.ended.records))
        assert served.ended.records[0].priority is expected


async def test_a_priority_that_is_not_listed_is_refused() -> None:
    async with serving(engine()) as served:
        request = Request(sentences=[tokens("a")], priority=cast("embed_pb2.Priority", 3))
        code, reason, _ = await refusal(served.stub.Embed(request))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.PRIORITY_INVALID)
        # No item behind the start: grpc.aio forgets the status of a call that ends while it writes
        code, reason, _ = await refusal(anext(aiter(served.stub.EmbedStream(messages(priority=3)))))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.PRIORITY_INVALID)


# ---- EmbedStream and GetModel ----


async def messages(*items: embed_pb2.Sentence, **start: Any) -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
    yield embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(**start))
    for number, sentence in enumerate(items):
        yield embed_pb2.EmbedStreamRequest(item=embed_pb2.StreamItem(id=number, sentence=sentence))


async def test_a_stream_answers_each_item() -> None:
    async with serving(engine()) as served:
        sentences = [tokens("a"), embed_pb2.Sentence(), text("b c")]
        found = {each.id: each async for each in served.stub.EmbedStream(messages(*sentences))}
        assert list(found[0].rows.embedding.tokens) == ["a"]
        assert reason_of(found[1].error) == Reason.SENTENCE_MISSING
        assert found[2].usage.tokens == 2
        (call,) = served.ended.records
        assert (call.method, call.model, call.code) == ("EmbedStream", "fake", Code.OK)
        assert (call.sentences, call.failed_sentences, call.tokens) == (3, 1, 3)


async def test_a_stream_that_is_cancelled_leaves_nothing() -> None:
    slow: FakeEngine[Sentence] = FakeEngine(Capacity(1, 100))
    async with serving(slow) as served:
        slow.go_on.clear()
        call = served.stub.EmbedStream(messages(*[tokens("a", "b")] * 10))
        await until(lambda: worker_of(served.embedder).pending == LIMITS.stream_items)
        call.cancel()
        await until(lambda: worker_of(served.embedder).pending == 0)
        await until(lambda: served.embedder.stream_admission.used == Cost(0, 0))


async def test_a_stream_of_another_model_is_refused() -> None:
    async with serving(engine()) as served:
        call = served.stub.EmbedStream(messages(model="other"))
        code, reason, _ = await refusal(anext(aiter(call)))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND)
        assert served.ended.records[0].model == ""


async def test_get_model_says_what_is_served() -> None:
    async with serving(engine()) as served:
        found = await served.stub.GetModel(embed_pb2.GetModelRequest())
        assert (found.name, found.version) == ("fake", served.embedder.model.version)
        assert (found.layer_count, found.width, found.cell_size, found.state_bytes) == (3, 4, 2, 8)
        assert (found.backend, found.tokenizer, found.precision) == ("fake", "whitespace", "float32")
        assert list(found.features) == ["priority", "selection"]
        assert found.limits == embed_pb2.Limits(
            max_sentences_per_request=LIMITS.sentences,
            max_tokens_per_request=LIMITS.tokens,
            max_tokens_per_sentence=LIMITS.sentence_tokens,
            max_request_bytes=4 * 2**20,
            max_response_bytes=LIMITS.response_bytes,
            max_stream_items_in_flight=LIMITS.stream_items,
        )
        code, _, _ = await refusal(served.stub.GetModel(embed_pb2.GetModelRequest(model="other")))
        assert code is grpc.StatusCode.NOT_FOUND
        assert list((await served.stub.ListModels(embed_pb2.ListModelsRequest())).models) == [found]


async def test_a_model_without_states_has_none() -> None:
    async with serving(FakeEngine(codec=None)) as served:
        assert (await served.stub.GetModel(embed_pb2.GetModelRequest())).state_bytes == 0
        response = await served.stub.Embed(Request(sentences=[tokens("a"), tokens("a", return_state=True)]))
        assert response.results[0].HasField("embedding")
        assert reason_of(response.results[1].error) == Reason.STATE_INVALID
