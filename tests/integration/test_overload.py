"""An overloaded server refuses before it works, raw text as tokens, and never for good."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2
from bilm_model.tokenization.types import TokenizedText, Tokenizer
from bilm_server.embedding.admission import Cost, Reservation

from tests.integration.integration_support import PLAIN, tokens
from tests.integration.test_embed import reason, refusal
from tests.integration.test_stream import item, start_message, stream
from tests.support.servers import LoopServer, serving

LIMIT = 600  # tokens: of what waits, and of a request


class WatchedTokenizer:
    """Keep every text that is tokenised."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def around(self, inner: Tokenizer) -> Tokenizer:
        """Return a tokenizer that does as `inner` does."""
        self._inner = inner
        return self

    @property
    def name(self) -> str:
        return self._inner.name

    def __call__(self, text: str) -> TokenizedText:
        self.texts.append(text)
        return self._inner(text)


@pytest.fixture(scope="module")
def tokenizer() -> WatchedTokenizer:
    return WatchedTokenizer()


@pytest.fixture(scope="module")
def small(tokenizer: WatchedTokenizer) -> Iterator[LoopServer]:
    """A server with little room."""
    flags = ("--max-waiting-tokens", str(LIMIT), "--max-tokens-per-request", str(LIMIT))
    with serving(*flags, tokenizer=tokenizer.around) as server:
        yield server


@pytest.fixture
def tokenised(tokenizer: WatchedTokenizer) -> list[str]:
    """Every text that is tokenised."""
    tokenizer.texts.clear()
    return tokenizer.texts


@contextmanager
def taken(server: LoopServer, n_tokens: int) -> Iterator[None]:
    """So many tokens of other calls wait."""
    admission = server.admission

    async def take() -> Reservation:
        return admission.reserve(Cost(n_tokens, 0), lambda: 1)

    async def release() -> None:
        reservation.release()
        deadline = time.monotonic() + 10
        while admission.used != Cost(0, 0):  # an answer holds its room until gRPC has sent it
            assert time.monotonic() < deadline, "a call still holds something"
            await asyncio.sleep(0.001)

    reservation: Reservation = server.call(take)
    try:
        yield
    finally:
        server.call(release)


def text(*texts: str) -> embed_pb2.EmbedRequest:
    return embed_pb2.EmbedRequest(options=PLAIN, sentences=[embed_pb2.Sentence(text=text) for text in texts])


def check_overloaded(server: LoopServer, request: embed_pb2.EmbedRequest) -> None:
    with pytest.raises(grpc.RpcError) as error:
        server.stub().Embed(request)
    code, why, metadata = refusal(error.value)
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert 20 <= int(metadata["grpc-retry-pushback-ms"]) <= 10_000


REQUESTS: dict[str, Any] = {
    "a short text": text("Some words."),
    "a long text": text("Some words. " * 200),
    "many texts": text(*["Some words."] * 50),
    "a single character": text("a"),
    "beyond the limit by its bytes": text("a" * 40 * LIMIT),
    "text and tokens": embed_pb2.EmbedRequest(sentences=[tokens("a"), embed_pb2.Sentence(text="b")]),
    "tokens": embed_pb2.EmbedRequest(sentences=[tokens("a", "b")]),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_full_server_refuses_before_it_tokenises(small: LoopServer, tokenised: list[str], case: str) -> None:
    with taken(small, LIMIT):
        check_overloaded(small, REQUESTS[case])
    assert tokenised == []
    small.stub().Embed(text("Some words."))
    assert tokenised == ["Some words."]


def test_text_that_looks_like_more_than_a_request_may_have_is_no_refusal_for_good(small: LoopServer) -> None:
    (result,) = small.stub().Embed(text("a" * 40 * LIMIT)).results  # 4,000 tokens by its bytes, and one in fact
    assert len(result.embedding.tokens) == 1


def test_text_with_more_tokens_than_its_bytes_tell_is_refused_only_while_they_do_not_fit(small: LoopServer) -> None:
    dense = text("a " * 300)  # 100 by its bytes
    with taken(small, 450):
        check_overloaded(small, dense)
    assert small.stub().Embed(dense).usage.tokens == 300


def test_text_with_too_many_tokens_is_refused_for_good_once_they_are_counted(small: LoopServer) -> None:
    with pytest.raises(grpc.RpcError) as error:
        small.stub().Embed(text("a " * (LIMIT + 1)))
    assert refusal(error.value)[1] == "TOO_MANY_TOKENS"
    with taken(small, 0):
        pass


def test_blank_text_is_embedded_by_a_full_server(small: LoopServer) -> None:
    with taken(small, LIMIT):
        assert len(small.stub().Embed(text("", " \n ")).results) == 2


def test_a_text_too_long_costs_the_others_nothing(small: LoopServer) -> None:
    first, second = small.stub().Embed(text("x" * 300 * 1024, "fine")).results
    assert first.HasField("error")
    assert second.HasField("embedding")


def test_a_callers_own_limit_comes_before_tokenising(tokenised: list[str]) -> None:
    flags = ("--max-tokens-per-request", "100", "--caller-tokens-per-s", "1")
    with serving(*flags) as server:
        stub = server.stub()
        for _ in range(2):
            stub.Embed(text("a " * 100))  # 34 by its bytes: corrected, so that two of them empty the bucket of 200
        tokenised.clear()
        with pytest.raises(grpc.RpcError) as error:
            stub.Embed(text("Some more words, please."))
        assert refusal(error.value)[1] == "CALLER_LIMIT"
        assert tokenised == []


def test_an_item_that_is_not_admitted_costs_its_caller_nothing() -> None:
    flags = ("--max-tokens-per-request", "6000", "--caller-tokens-per-s", "1", "--max-stream-mib", "1")
    with serving(*flags) as server:
        words = tokens(*["a"] * 6000)  # 1.2 MiB of vectors; the caller's bucket holds 12,000
        (answer,) = stream(server, start_message(), item(1, words))
        assert reason(answer.error) == "RESPONSE_TOO_LARGE"
        for _ in range(2):
            assert server.stub().Embed(embed_pb2.EmbedRequest(sentences=[words])).usage.tokens == 6000
