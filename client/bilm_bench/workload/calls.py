"""Calls: made beforehand, sent on one connection after another, and what came of each."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import cycle
from types import TracebackType
from typing import Any, Self

import grpc
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from bilm_client._core.inputs import Sentence, parse_sentence
from bilm_client._core.settings import Settings
from bilm_client._transport.channels import async_channel
from bilm_client.errors import MalformedResponseError, ServiceError, sentence_error, service_error
from bilm_client.policy import DEFAULT_KEEPALIVE, SERVICE_NAME, RetryPolicy
from bilm_client.results import ModelInfo
from google.protobuf.message import DecodeError

from bilm_bench.workload.expected import KnownAnswers
from bilm_bench.workload.texts import n_words

_EMBED = f"/{SERVICE_NAME}/Embed"
# The server did take the work on, and then couldn't do it.
_NOT_REFUSALS = frozenset({Reason.INTERNAL, Reason.DEADLINE_EXCEEDED})
_MOST_MESSAGE = 200
ONE_ATTEMPT = RetryPolicy(max_attempts=1)


class Kind(Enum):
    """What became of a call."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Request:
    """A call to make.

    Attributes:
        message: an EmbedRequest, serialised, so that it costs nothing when it is sent.
        indices: of its sentences.
        n_tokens: of them all; where the server tokenises, a guess.
    """

    message: bytes
    indices: tuple[int, ...]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call.

    Attributes:
        kind: REFUSED if the server says why it doesn't do the work, FAILED for everything else but an answer.
        code: the status.
        reason: the server's, or "".
        message: for people.
        pushback_ms: the server's, or None.
        sentences: that were answered with vectors.
        tokens: that were computed, as the server counts them.
        sentence_errors: sentences that weren't, by reason.
        checked: sentences whose answer was compared with the known one.
        wrong: of those, how many differ.
    """

    kind: Kind
    code: str = grpc.StatusCode.OK.name
    reason: str = ""
    message: str = ""
    pushback_ms: int | None = None
    sentences: int = 0
    tokens: int = 0
    sentence_errors: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    wrong: int = 0


def make_requests(sentences: Sequence[Sentence], per_call: int, options: pb.EmbedOptions) -> list[Request]:
    """Calls with so many sentences each, which are neighbours in the text; every sentence is in one, some in more."""
    inputs = [parse_sentence(sentence, f"sentence {index}") for index, sentence in enumerate(sentences)]
    requests = []
    for first in range(0, len(sentences), per_call):
        indices = tuple(index % len(sentences) for index in range(first, first + per_call))
        request = pb.EmbedRequest(options=options)
        for index in indices:
            inputs[index].write(request.sentences.add())
        n_tokens = sum(n_words(sentences[index]) for index in indices)
        requests.append(Request(request.SerializeToString(), indices, n_tokens))
    return requests


def client_settings(
    target: str,
    *,
    timeout_s: float,
    retry: RetryPolicy,
    credentials: grpc.ChannelCredentials | None,
    token: str | None,
    metadata: Sequence[tuple[str, str]],
    proxy: bool = True,
) -> Settings:
    """How the bench connects: as the client does, but each channel on a connection of its own."""
    return Settings(
        target=target,
        model="",
        expected_model_version="",
        timeout_s=timeout_s,
        retry=retry,
        keepalive=DEFAULT_KEEPALIVE,
        credentials=credentials,
        token=token,
        metadata=metadata,
        channel_options=[("grpc.use_local_subchannel_pool", 1)],
        proxy=proxy,
    )


class Connections:
    """So many connections to a server, used in turn; an asynchronous context manager.

    Args:
        settings: how to connect.
        count: connections.
    """

    def __init__(self, settings: Settings, count: int) -> None:
        self._settings, self._count = settings, count
        self._metadata = settings.call_metadata()
        self._channels: list[grpc.aio.Channel] = []
        self._embed: Iterator[Any] = iter(())

    async def __aenter__(self) -> Self:
        self._channels = [async_channel(self._settings) for _ in range(self._count)]
        self._embed = cycle([channel.unary_unary(_EMBED) for channel in self._channels])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for channel in self._channels:
            await channel.close()

    async def open(self, timeout_s: float) -> ModelInfo:
        """Connects them all.

        Raises:
            ServiceError: if the server can't be reached, or doesn't say what it serves.
        """

        async def ask(channel: grpc.aio.Channel) -> pb.GetModelResponse:
            stub: Any = embed_pb2_grpc.EmbedServiceStub(channel)
            response: pb.GetModelResponse = await stub.GetModel(
                pb.GetModelRequest(), timeout=timeout_s, metadata=self._metadata
            )
            return response

        try:
            found = await asyncio.gather(*map(ask, self._channels))
        except grpc.aio.AioRpcError as error:
            raise service_error(error) from error
        return ModelInfo.from_proto(found[0])

    async def send(self, request: Request) -> pb.EmbedResponse:
        """The response, with as many results as the request has sentences.

        Raises:
            ServiceError: if there is none.
            MalformedResponseError: if it has not the form of one.
        """
        call = next(self._embed)(request.message, timeout=self._settings.timeout_s, metadata=self._metadata)
        try:
            response = pb.EmbedResponse.FromString(await call)
        except grpc.aio.AioRpcError as error:
            raise service_error(error) from error
        except asyncio.CancelledError:
            # gRPC raises this for a call that ended CANCELLED as well as for a task that is being cancelled.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ServiceError("the call was cancelled", code=grpc.StatusCode.CANCELLED) from None
        except DecodeError as error:
            raise MalformedResponseError(str(error)) from error
        if len(response.results) != len(request.indices):
            raise MalformedResponseError(f"expected {len(request.indices)} results, got {len(response.results)}")
        return response


async def make_call(connections: Connections, known: KnownAnswers | None, request: Request) -> Answer:
    """Sends a request; everything that can come of it is an answer."""
    try:
        response = await connections.send(request)
    except ServiceError as error:
        refused = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED or error.reason not in ("", *_NOT_REFUSALS)
        kind = Kind.REFUSED if refused else Kind.FAILED
        return Answer(kind, error.code.name, error.reason, error.message[:_MOST_MESSAGE], error.pushback_ms)
    except MalformedResponseError as error:
        return Answer(Kind.FAILED, grpc.StatusCode.OK.name, "MALFORMED_RESPONSE", str(error))
    errors = Counter(_reason(result) for result in response.results if not result.HasField("embedding"))
    results = zip(request.indices, response.results, strict=True)
    wrong = 0 if known is None else sum(not known.is_right(index, result) for index, result in results)
    return Answer(
        Kind.ACCEPTED,
        sentences=len(response.results) - errors.total(),
        tokens=response.usage.tokens,
        sentence_errors=errors,
        checked=0 if known is None else len(request.indices),
        wrong=wrong,
    )


async def learn(connections: Connections, requests: Iterable[Request], known: KnownAnswers) -> None:
    """Asks each of these one-sentence requests alone, one after another, and keeps the answers.

    Raises:
        BilmError: if one isn't answered, or not as the contract says.
    """
    for request in requests:
        response = await connections.send(request)
        for index, result in zip(request.indices, response.results, strict=True):
            known.keep(index, result)


def _reason(result: pb.EmbedResult) -> str:
    if not result.HasField("error"):
        return "MALFORMED_RESPONSE"
    error = sentence_error(result.error, 0)
    return error.reason or error.code.name
