"""Calls: made beforehand, sent on one connection after another, and the result of each."""

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
from bilm_client._core.inputs import WholeSentence, parse_sentence
from bilm_client._core.settings import Settings
from bilm_client._transport.channels import async_channel
from bilm_client.errors import MalformedResponseError, ServiceError, sentence_error, service_error
from bilm_client.policy import SERVICE_NAME, Balance, RetryPolicy
from bilm_client.results import ModelInfo
from google.protobuf.message import DecodeError

from bilm_bench.workload.expected import ExpectedResults
from bilm_bench.workload.texts import n_words

_EMBED = f"/{SERVICE_NAME}/Embed"
# The server did take the work on, and then couldn't do it.
_NOT_REFUSALS = frozenset({Reason.INTERNAL, Reason.DEADLINE_EXCEEDED})
_MOST_MESSAGE = 200
ONE_ATTEMPT = RetryPolicy(max_attempts=1)


class CallKind(Enum):
    """What became of a call."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Request:
    """A call to make.

    Attributes:
        message: An EmbedRequest, serialised, so that it costs nothing when it is sent.
        indices: Numbers of its sentences.
        n_tokens: Tokens of all of them; where the server tokenises, an estimate.
    """

    message: bytes
    indices: tuple[int, ...]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class CallResult:
    """How a call ended.

    Attributes:
        kind: REFUSED if the server gives a reason for not doing the work, FAILED for everything else but a response.
        code: The status.
        reason: The server's, or "".
        message: What went wrong, for people to read.
        pushback_ms: The server's, or None.
        sentences: Sentences with vectors.
        tokens: Tokens that were computed, as the server counts them.
        sentence_errors: Sentences without vectors, by reason.
        checked: Sentences whose result was compared with the expected one.
        wrong: Sentences whose result differs.
    """

    kind: CallKind
    code: str = grpc.StatusCode.OK.name
    reason: str = ""
    message: str = ""
    pushback_ms: int | None = None
    sentences: int = 0
    tokens: int = 0
    sentence_errors: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    wrong: int = 0


def make_requests(sentences: Sequence[WholeSentence], per_call: int, common: pb.EmbedRequest) -> list[Request]:
    """Return calls with so many sentences each, neighbours in the text; every sentence is in one, some in more.

    Args:
        sentences: The text.
        per_call: Sentences of a call.
        common: What all calls say: model, options, priority.
    """
    inputs = [parse_sentence(sentence, f"sentence {index}") for index, sentence in enumerate(sentences)]
    requests = []
    for first in range(0, len(sentences), per_call):
        indices = tuple(index % len(sentences) for index in range(first, first + per_call))
        request = pb.EmbedRequest()
        request.CopyFrom(common)
        for index in indices:
            inputs[index].write(request.sentences.add())
        n_tokens = sum(n_words(sentences[index]) for index in indices)
        requests.append(Request(request.SerializeToString(), indices, n_tokens))
    return requests


def client_settings(
    target: str,
    *,
    balance: Balance = "first",
    model: str = "",
    timeout_s: float,
    retry: RetryPolicy,
    credentials: grpc.ChannelCredentials | None,
    token: str | None,
    metadata: Sequence[tuple[str, str]],
    proxy: bool = True,
) -> Settings:
    """Return settings by which each channel has a connection of its own; otherwise the client's."""
    return Settings(
        target=target,
        balance=balance,
        model=model,
        timeout_s=timeout_s,
        retry=retry,
        credentials=credentials,
        token=token,
        metadata=metadata,
        channel_options=[("grpc.use_local_subchannel_pool", 1)],
        proxy=proxy,
    )


class Connections:
    """Connections to a server, used in turn; an asynchronous context manager.

    Args:
        settings: How to connect.
        count: Number of connections.
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
        """Connect them all.

        Raises:
            ServiceError: The server can't be reached, or GetModel fails.
        """

        async def ask(channel: grpc.aio.Channel) -> pb.GetModelResponse:
            stub: Any = embed_pb2_grpc.EmbedServiceStub(channel)
            response: pb.GetModelResponse = await stub.GetModel(
                pb.GetModelRequest(model=self._settings.model), timeout=timeout_s, metadata=self._metadata
            )
            return response

        try:
            found = await asyncio.gather(*map(ask, self._channels))
        except grpc.aio.AioRpcError as error:
            raise service_error(error) from error
        return ModelInfo.from_proto(found[0])

    async def send(self, request: Request) -> pb.EmbedResponse:
        """Return the response, with as many results as the request has sentences.

        Raises:
            ServiceError: There is none.
            MalformedResponseError: It doesn't parse, or has another number of results.
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


async def make_call(connections: Connections, expected: ExpectedResults | None, request: Request) -> CallResult:
    """Send a request; every way in which it can end is a result."""
    try:
        response = await connections.send(request)
    except ServiceError as error:
        refused = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED or error.reason not in ("", *_NOT_REFUSALS)
        kind = CallKind.REFUSED if refused else CallKind.FAILED
        return CallResult(kind, error.code.name, error.reason, error.message[:_MOST_MESSAGE], error.pushback_ms)
    except MalformedResponseError as error:
        return CallResult(CallKind.FAILED, grpc.StatusCode.OK.name, "MALFORMED_RESPONSE", str(error))
    errors = Counter(_reason(result) for result in response.results if not result.HasField("embedding"))
    results = zip(request.indices, response.results, strict=True)
    wrong = 0 if expected is None else sum(not expected.matches(index, result) for index, result in results)
    return CallResult(
        CallKind.ACCEPTED,
        sentences=len(response.results) - errors.total(),
        tokens=response.usage.tokens,
        sentence_errors=errors,
        checked=0 if expected is None else len(request.indices),
        wrong=wrong,
    )


async def fetch_expected(connections: Connections, requests: Iterable[Request], expected: ExpectedResults) -> None:
    """Send each of these one-sentence requests alone, one after another, and keep the results.

    Raises:
        BilmError: A call failed, or its response breaks the contract.
    """
    for request in requests:
        response = await connections.send(request)
        for index, result in zip(request.indices, response.results, strict=True):
            expected.keep(index, result)


def _reason(result: pb.EmbedResult) -> str:
    if not result.HasField("error"):
        return "MALFORMED_RESPONSE"
    error = sentence_error(result.error, 0)
    return error.reason or error.code.name
