"""What embedding sentences means whatever the protocol; no grpc here."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from bilm_api.constants import Reason
from bilm_model.engine.types import Capacity
from bilm_model.tokenization.types import TokenizedText
from bilm_server.embedding.admission import Cost
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.embedder import Embedder
from bilm_server.errors import Code, RefusalError
from bilm_server.inference.types import Call, Result, Sentence
from bilm_server.observability.call_record import CallRecord

from tests.support.embedders import embedding, entered, until, worker_of
from tests.support.fake_engine import FakeEngine, fake_model
from tests.support.sentences import PLAIN

TOKEN_BYTES = 3 * 4 * 4
OVERHEAD = 100


class Listed:
    """A protocol whose response is the list of results, with 100 bytes for each sentence."""

    def overhead_bytes(self, sentence: Sentence) -> int:
        return OVERHEAD

    def build(
        self, sentences: Sequence[Sentence], results: Sequence[Result | RefusalError]
    ) -> list[Result | RefusalError]:
        assert len(sentences) == len(results)
        return list(results)


def new(*contents: str | list[str] | None, call: Call | None = None) -> list[Sentence]:
    own = call or Call()
    return [Sentence(own, content, PLAIN) for content in contents]


def reason(result: Any) -> Reason:
    assert isinstance(result, RefusalError), result
    return result.reason


def refusal(task: "asyncio.Task[Any]") -> Reason:
    return reason(task.exception())


@contextmanager
def a_call() -> Iterator[CallRecord]:
    """A call whose response is sent when the context ends."""
    call = CallRecord("Embed", "peer", caller="somebody")
    with entered(call), closing(call.held):
        yield call


def begin(embedder: Embedder, sentences: Sequence[Sentence]) -> "asyncio.Task[list[Result | RefusalError]]":
    return asyncio.create_task(embedder.embed(sentences, 10, Listed()))


@pytest.fixture
def engine() -> FakeEngine[Sentence]:
    return FakeEngine()


@pytest.fixture
def held(engine: FakeEngine[Sentence]) -> Callable[[], Any]:
    """Hold the engine's next round; the awaitable ends when it has begun."""

    def hold() -> Any:
        engine.computing.clear()
        engine.go_on.clear()
        return asyncio.to_thread(engine.computing.wait, 60)

    return hold


# ---- calls ----


async def test_each_sentence_has_its_result_or_its_refusal_in_its_place(engine: FakeEngine[Sentence]) -> None:
    async with embedding(engine) as embedder:
        with a_call() as call:
            found = await begin(embedder, new("a b", None, ["c", ""], ["poison"], "d"))
    assert [reason(found[index]) for index in (1, 2, 3)] == [
        Reason.SENTENCE_MISSING, Reason.TOKEN_EMPTY, Reason.INTERNAL,
    ]  # fmt: skip
    first, last = found[0], found[4]
    assert isinstance(first, Result)
    assert isinstance(last, Result)
    assert first.vectors[0, :, 0].tolist() == [97, 98]
    assert last.vectors[0, :, 0].tolist() == [100]
    assert (call.sentences, call.failed_sentences, call.tokens) == (5, 3, 3)
    assert call.queue_s >= 0
    assert call.inference_s > 0


async def test_a_call_without_any_good_sentence_computes_nothing(engine: FakeEngine[Sentence]) -> None:
    async with embedding(engine) as embedder:
        with a_call() as call:
            found = await begin(embedder, new(None, [""]))
    assert [reason(each) for each in found] == [Reason.SENTENCE_MISSING, Reason.TOKEN_EMPTY]
    assert (call.sentences, call.failed_sentences, call.tokens) == (2, 2, 0)
    assert engine.groups == []


async def test_an_engine_that_fails_ends_the_whole_call(engine: FakeEngine[Sentence]) -> None:
    async with embedding(engine) as embedder:
        with a_call() as call:
            engine.broken = 1
            task = begin(embedder, new("a", "b"))
            await asyncio.wait([task])
            assert refusal(task) is Reason.MODEL_FAILING
            assert embedder.admission.used == Cost(0, 0)
    assert call.sentences == 0


async def test_a_late_sentence_ends_the_whole_call_and_its_siblings(held: Callable[[], Any]) -> None:
    engine: FakeEngine[Sentence] = FakeEngine(Capacity(1, 100))
    async with embedding(engine) as embedder:
        engine.go_on.clear()
        with a_call():
            task = begin(embedder, [*new("a b c"), *new("d e", "f", call=Call(deadline_s=0.0))])
            await asyncio.wait([task])  # while the first one's round is held, if it has come that far
            engine.go_on.set()
            assert refusal(task) is Reason.DEADLINE_EXCEEDED
    assert engine.stats.steps < 3 + 2


async def test_room_is_reserved_before_and_corrected_after_tokenising(
    engine: FakeEngine[Sentence], held: Callable[[], Any]
) -> None:
    async with embedding(engine) as embedder:
        with a_call():
            begun = held()
            task = begin(embedder, new("aaaaaaaaaaaa b"))  # 14 bytes: 3 tokens, until they are counted
            await begun
            assert embedder.admission.used == Cost(2, 2 * TOKEN_BYTES + OVERHEAD)
            engine.go_on.set()
            await task
            assert embedder.admission.used == Cost(0, 2 * TOKEN_BYTES + OVERHEAD)  # until the response has been sent
        assert embedder.admission.used == Cost(0, 0)


async def test_a_call_that_finds_no_room_is_refused_before_it_is_tokenised() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    tokenised: list[str] = []

    class Noting:
        name = "noting"

        def __call__(self, text: str) -> TokenizedText:
            tokenised.append(text)
            return TokenizedText(("a",), (0,), (1,))

    model = replace(fake_model(engine), tokenizer=Noting())
    async with embedding(engine, model=model, max_tokens=10) as embedder:
        with embedder.admission.reserve(Cost(8, 0), lambda: 100), a_call(), pytest.raises(RefusalError) as error:
            await begin(embedder, new("a" * 18))
        assert error.value.reason is Reason.OVERLOADED
        assert 20 <= error.value.retry_after_ms <= 10_000
        assert tokenised == []
        with embedder.admission.reserve(Cost(8, 0), lambda: 100), a_call():
            await begin(embedder, new("a" * 12))
        assert len(tokenised) == 1


async def test_a_call_whose_tokens_turn_out_to_be_too_many_for_now_is_refused(engine: FakeEngine[Sentence]) -> None:
    async with embedding(engine, max_tokens=20) as embedder:
        with embedder.admission.reserve(Cost(10, 0), lambda: 100), a_call():
            with pytest.raises(RefusalError) as error:
                await begin(embedder, new("a " * 11))  # 22 bytes: 4 tokens, and in fact 11
            assert error.value.reason is Reason.OVERLOADED
            assert embedder.admission.used == Cost(10, 0)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ([], Reason.SENTENCES_MISSING),
        (["a"] * 9, Reason.TOO_MANY_SENTENCES),
        ([["a"] * 500] * 3, Reason.TOO_MANY_TOKENS),
        (["a " * 400] * 3, Reason.TOO_MANY_TOKENS),
    ],
)
async def test_calls_of_too_much_or_nothing_are_refused_for_good(
    engine: FakeEngine[Sentence], contents: list[Any], expected: Reason
) -> None:
    async with embedding(engine) as embedder:
        with a_call(), pytest.raises(RefusalError) as error:
            await begin(embedder, new(*contents))
        assert error.value.reason is expected
        assert embedder.idle


async def test_a_response_that_is_too_large_is_refused_before_it_is_computed(engine: FakeEngine[Sentence]) -> None:
    most = 3 * TOKEN_BYTES + 2 * OVERHEAD
    async with embedding(engine, response_bytes=most) as embedder:
        with a_call():
            await begin(embedder, new("a b", "c"))
        rounds = len(engine.groups)
        with a_call(), pytest.raises(RefusalError) as error:
            await begin(embedder, new("a b", "c d"))
        assert (error.value.reason, error.value.retry_after_ms) == (Reason.RESPONSE_TOO_LARGE, -1)
        assert len(engine.groups) == rounds


@pytest.mark.parametrize("moment", ["waiting", "computing"])
async def test_a_cancelled_call_leaves_nothing(moment: str, held: Callable[[], Any]) -> None:
    engine: FakeEngine[Sentence] = FakeEngine(Capacity(1, 100))
    async with embedding(engine) as embedder:
        engine.go_on.clear()
        with a_call():
            task = begin(embedder, new("a b", "c d", "e f"))
            await until(lambda: worker_of(embedder).in_flight == 1 and worker_of(embedder).waiting == 2)
            if moment == "computing":
                engine.go_on.set()
                engine.go_on.clear()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert embedder.admission.used == Cost(0, 0)
            assert worker_of(embedder).pending == worker_of(embedder).waiting == 0
        engine.go_on.set()
        await until(lambda: embedder.idle)
    assert engine.stats.steps <= 2


async def test_a_call_that_is_over_while_it_is_computed_takes_nothing_again(
    engine: FakeEngine[Sentence], held: Callable[[], Any]
) -> None:
    """grpc says that the call is over before it cancels the method."""
    async with embedding(engine) as embedder:
        with a_call() as call:
            begun = held()
            task = begin(embedder, new("a"))
            await begun
            call.held.close()
            assert embedder.admission.used == Cost(0, 0)
            engine.go_on.set()
            await task
            assert embedder.admission.used == Cost(0, 0)


async def test_a_caller_is_charged_for_what_it_costs_in_fact() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    limits = CallerLimits(1.0, 0, 20, clock=lambda: 0.0)  # a bucket of 40 tokens that doesn't fill
    async with embedding(engine, caller_limits=limits, response_bytes=1000) as embedder:
        for _ in range(10):  # none of these is computed, so none of them costs anything
            with a_call(), pytest.raises(RefusalError):
                await begin(embedder, new("a " * 20))
        for content in ("a" * 60, ["a"] * 8, ["a"] * 8):  # 1, although its bytes are 10 tokens
            with a_call():
                await begin(embedder, new(content))
        with a_call(), pytest.raises(RefusalError) as error:
            await begin(embedder, new(*[["a"] * 8] * 3))
        assert error.value.reason is Reason.RESPONSE_TOO_LARGE
        for _ in range(2):
            with a_call():
                await begin(embedder, new(["a"] * 8))
        with a_call(), pytest.raises(RefusalError) as error:
            await begin(embedder, new(["a"] * 8))
        assert error.value.reason is Reason.CALLER_LIMIT
        assert error.value.retry_after_ms > 0


# ---- streams ----


def overhead(sentence: Sentence) -> int:
    return OVERHEAD


async def test_a_streams_sentences_are_let_in_one_by_one(engine: FakeEngine[Sentence]) -> None:
    async with embedding(engine) as embedder:
        with a_call() as call:
            stream = embedder.stream()
            for content in ("a b", ["c"]):
                (sentence,) = new(content)
                with await stream.place(), await stream.admit(sentence, 10, overhead) as room:
                    assert room.cost == Cost(len(sentence.tokens), len(sentence.tokens) * TOKEN_BYTES + OVERHEAD)
                    assert embedder.stream_admission.used == room.cost
                    assert (await stream.embed(sentence)).vectors[0, 0, 0] in {97, 99}
            assert embedder.stream_admission.used == embedder.admission.used == Cost(0, 0)
    assert (call.sentences, call.failed_sentences, call.tokens) == (2, 0, 3)


async def test_a_bad_sentence_of_a_stream_counts_as_failed_and_holds_nothing(engine: FakeEngine[Sentence]) -> None:
    async with embedding(engine) as embedder:
        with a_call() as call:
            stream = embedder.stream()
            for content in (None, ["poison"]):
                (sentence,) = new(content)
                with pytest.raises(RefusalError) as error, await stream.admit(sentence, 10, overhead):
                    await stream.embed(sentence)
                assert error.value.reason in {Reason.SENTENCE_MISSING, Reason.INTERNAL}
    assert (call.sentences, call.failed_sentences) == (2, 2)


async def test_what_ends_the_whole_stream_is_no_sentences_failure(engine: FakeEngine[Sentence]) -> None:
    async with embedding(engine) as embedder:
        with a_call() as call:
            stream, (sentence,) = embedder.stream(), new("a")
            engine.broken = 1
            with pytest.raises(RefusalError) as error, await stream.admit(sentence, 10, overhead):
                await stream.embed(sentence)
            assert error.value.code is Code.UNAVAILABLE
    assert (call.sentences, call.failed_sentences) == (0, 0)


async def test_a_sentence_waits_for_room_and_takes_its_tokens_back_when_it_is_cancelled() -> None:
    engine: FakeEngine[Sentence] = FakeEngine()
    limits = CallerLimits(1.0, 0, 20, clock=lambda: 0.0)  # streams leave 20 of its 40 tokens
    async with embedding(engine, max_tokens=10, caller_limits=limits) as embedder:
        with a_call():
            stream, other = embedder.stream(), embedder.stream()
            (first, last) = new(["a"] * 8, ["c"] * 8)
            with await other.admit(first, 10, overhead):
                for _ in range(9):
                    (second,) = new(["b"] * 8)
                    waiting = asyncio.create_task(stream.admit(second, 10, overhead))
                    await until(lambda: embedder.stream_admission.waiting == 1)
                    waiting.cancel()
                    await asyncio.wait([waiting])
                waiting = asyncio.create_task(stream.admit(last, 10, overhead))
                await until(lambda: embedder.stream_admission.waiting == 1)
            (await waiting).release()


async def test_a_sentence_continues_from_the_last_one_unless_it_has_a_state_itself(
    engine: FakeEngine[Sentence],
) -> None:
    async with embedding(engine) as embedder:
        with a_call():
            stream = embedder.stream()
            sentences = new("a a", "a", "a", "a")
            sentences[2].state_bytes = (10).to_bytes(8, "little")
            found = []
            for sentence in sentences:
                with await stream.admit(sentence, 10, overhead):
                    found.append(await stream.embed_next(sentence))
    assert [result.vectors[0, 0, 0] - ord("a") for result in found] == [0, 2, 10, 11]
    assert [result.state for result in found] == [2, 3, 11, 12]


async def test_an_embedder_says_what_it_holds(engine: FakeEngine[Sentence], held: Callable[[], Any]) -> None:
    async with embedding(engine) as embedder:

        def idle() -> bool:
            return embedder.idle

        assert idle()
        with embedder.admission.reserve(Cost(1, 0), lambda: 1):
            assert not idle()
        with a_call():
            begun = held()
            task = begin(embedder, new("a"))
            await begun
            assert not idle()
            engine.go_on.set()
            await task
            assert not idle()  # the response isn't sent
        await until(idle)
