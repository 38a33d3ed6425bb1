"""What the callers of a chaos run do; each method is one call, or one stream, with every answer compared."""

import random
from collections.abc import Iterator
from contextlib import aclosing, closing
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from bilm_client import AsyncClient, Client, Embedding
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fault.chaos_bad_requests import BadRequests
from tests.fault.chaos_records import Recorder, StatusError
from tests.fault.known_answers import N_BARE_OPTIONS, N_DOCUMENTS, OPTIONS, KnownAnswers, WrongAnswerError, bare_options

LIMIT_S = 10.0
"""The deadline of each call; of a client's streams, of each result."""
# gRPC waits up to 120 s between two attempts to connect; a run has more faults than that in two minutes
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)
MAX_RECEIVE_BYTES = 20 * 2**20
_HEALTH_LIMIT_S = 5.0
_CARRY_EVERY = 4
_WINDOWS = (1, 8, 64)


class Callers:
    """The callers on one path that need no event loop."""

    def __init__(self, path: str, target: str, recorder: Recorder, known: KnownAnswers) -> None:
        self.path = path
        self._recorder, self._known = recorder, known
        self._client = Client(target, channel_options=CHANNEL_OPTIONS)
        self._channel = grpc.insecure_channel(
            target, options=[*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES)]
        )
        self._stub = embed_pb2_grpc.EmbedServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._bad = BadRequests(self._channel, known, LIMIT_S)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()
        self._channel.close()

    def unary(self, chance: random.Random) -> bool:
        """`Client.embed`; one time in four of some tokens of each sentence."""
        if chance.random() < 0.25:
            return self._chosen(chance)
        options, indices = chance.randrange(len(OPTIONS)), some(self._known, chance, 6)
        with self._recorder.call("client", self.path, LIMIT_S) as attempt:
            found = self._client.embed(sentences(self._known, indices), **OPTIONS[options], timeout_s=LIMIT_S)
            for embedding, index in zip(found, indices, strict=True):
                self._known.check(embedding, options, index)
        return attempt.succeeded

    def stream(self, chance: random.Random) -> bool:
        """`Client.embed_stream`; each result counts."""
        options, indices = chance.randrange(len(OPTIONS)), some(self._known, chance, 40)
        results = self._client.embed_stream(
            sentences(self._known, indices), **OPTIONS[options], window=chance.choice(_WINDOWS), timeout_s=LIMIT_S
        )
        with closing(results):
            for index in indices:
                with self._recorder.call("client stream", self.path, LIMIT_S) as attempt:
                    self._known.check(due(next(results, None)), options, index)
                if not attempt.succeeded:
                    return False
        return True

    def _chosen(self, chance: random.Random) -> bool:
        indices = some(self._known, chance, 6)
        asked = [self._known.choose(chance, index) for index in indices]
        with self._recorder.call("client chosen", self.path, LIMIT_S) as attempt:
            found = self._client.embed(asked, timeout_s=LIMIT_S)
            for embedding, chosen, index in zip(found, asked, indices, strict=True):
                self._known.check_chosen(embedding, chosen, index)
        return attempt.succeeded

    def document(self, chance: random.Random) -> bool:
        """`Client.embed_stream` with a carried state; each result counts."""
        document = chance.randrange(N_DOCUMENTS)
        text = self._known.document(document)
        results = self._client.embed_stream(
            text, carry_state=True, return_state_every=_CARRY_EVERY, window=chance.choice(_WINDOWS), timeout_s=LIMIT_S
        )
        with closing(results):
            for position in range(len(text)):
                with self._recorder.call("client document", self.path, LIMIT_S) as attempt:
                    self._known.check_in_document(due(next(results, None)), document, position)
                if not attempt.succeeded:
                    return False
        return True

    def bare_unary(self, chance: random.Random) -> bool:
        """`Embed` on a bare stub, without any retry."""
        options, indices = chance.randrange(N_BARE_OPTIONS), some(self._known, chance, 6)
        with self._recorder.call("bare", self.path, LIMIT_S) as attempt:
            response = self._stub.Embed(self._known.request(options, indices), timeout=LIMIT_S)
            for result, index in zip(response.results, indices, strict=True):
                self._known.check_message(result.embedding, options, index)
        return attempt.succeeded

    def bare_stream(self, chance: random.Random) -> bool:
        """`EmbedStream` on a bare stub; the whole stream counts as one call."""
        options, indices = chance.randrange(N_BARE_OPTIONS), some(self._known, chance, 20)
        with self._recorder.call("bare stream", self.path, LIMIT_S) as attempt:
            messages = self._messages(options, indices)
            left = dict(enumerate(indices))
            for response in self._stub.EmbedStream(messages, timeout=LIMIT_S):
                self._known.check_message(response.rows.embedding, options, left.pop(response.id))
            if left:
                raise WrongAnswerError(f"{len(left)} results never came")
        return attempt.succeeded

    def _messages(self, options: int, indices: list[int]) -> Iterator[pb.EmbedStreamRequest]:
        yield pb.EmbedStreamRequest(start=pb.StreamStart(options=bare_options(options)))
        for number, index in enumerate(indices):
            yield pb.EmbedStreamRequest(item=pb.StreamItem(id=number, sentence=self._known.message(index)))

    def bad(self, chance: random.Random) -> bool:
        """A request that must be refused."""
        if chance.random() < 0.2:
            with self._recorder.call("bad sentences", self.path, LIMIT_S) as attempt:
                self._bad.check_bad_sentences()
            return attempt.succeeded
        request = self._bad.choose(chance)
        with self._recorder.call("bad request", self.path, LIMIT_S, request.expected) as attempt:
            request.send()
        return not attempt.succeeded

    def health(self, _: random.Random) -> bool:
        """`Check`."""
        with self._recorder.call("health", self.path, _HEALTH_LIMIT_S) as attempt:
            response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_LIMIT_S)
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                raise StatusError("NOT_SERVING")
        return attempt.succeeded


class AsyncCallers:
    """The callers on one path that share an event loop."""

    def __init__(self, path: str, target: str, recorder: Recorder, known: KnownAnswers) -> None:
        self.path = path
        self._recorder, self._known = recorder, known
        self._client = AsyncClient(target, channel_options=CHANNEL_OPTIONS)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def unary(self, chance: random.Random) -> bool:
        """`AsyncClient.embed`."""
        options, indices = chance.randrange(len(OPTIONS)), some(self._known, chance, 6)
        with self._recorder.call("async client", self.path, LIMIT_S) as attempt:
            found = await self._client.embed(sentences(self._known, indices), **OPTIONS[options], timeout_s=LIMIT_S)
            for embedding, index in zip(found, indices, strict=True):
                self._known.check(embedding, options, index)
        return attempt.succeeded

    async def stream(self, chance: random.Random) -> bool:
        """`AsyncClient.embed_stream`; each result counts."""
        options, indices = chance.randrange(len(OPTIONS)), some(self._known, chance, 40)
        results = self._client.embed_stream(
            sentences(self._known, indices), **OPTIONS[options], window=chance.choice(_WINDOWS), timeout_s=LIMIT_S
        )
        async with aclosing(results):
            for index in indices:
                with self._recorder.call("async stream", self.path, LIMIT_S) as attempt:
                    self._known.check(due(await anext(results, None)), options, index)
                if not attempt.succeeded:
                    return False
        return True

    async def document(self, chance: random.Random) -> bool:
        """`AsyncClient.embed_stream` with a carried state; each result counts."""
        document = chance.randrange(N_DOCUMENTS)
        text = self._known.document(document)
        results = self._client.embed_stream(
            text, carry_state=True, return_state_every=_CARRY_EVERY, window=chance.choice(_WINDOWS), timeout_s=LIMIT_S
        )
        async with aclosing(results):
            for position in range(len(text)):
                with self._recorder.call("async document", self.path, LIMIT_S) as attempt:
                    self._known.check_in_document(due(await anext(results, None)), document, position)
                if not attempt.succeeded:
                    return False
        return True


def some(known: KnownAnswers, chance: random.Random, most: int) -> list[int]:
    """Indices of one to `most` sentences."""
    return chance.choices(range(len(known.corpus)), k=chance.randint(1, most))


def sentences(known: KnownAnswers, indices: list[int]) -> list[Any]:
    """The sentences."""
    return [known.corpus[index] for index in indices]


def due(result: Embedding | None) -> Embedding:
    """A result that a stream owes.

    Raises:
        WrongAnswerError: The stream had ended before.
    """
    if result is None:
        raise WrongAnswerError("the stream ended early")
    return result
