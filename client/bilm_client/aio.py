"""The asynchronous client: the same surface as `bilm_client.Client`, with awaits."""

import asyncio
import random
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing
from functools import partial
from typing import Any, Literal, Self, Unpack, overload

import grpc
from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.balancing import as_target
from bilm_client._core.chosen import Chosen
from bilm_client._core.inputs import Input, Sentence
from bilm_client._core.job import EmbedJob, Outcome, at_index, embed_job
from bilm_client._core.keywords import (
    EmbedArguments,
    EmbedKeywords,
    StreamArguments,
    StreamKeywords,
    keywords_of,
    parse_keywords,
)
from bilm_client._core.options import StatedPriority
from bilm_client._core.session import ResumableSession, check_iterable, stream_by_job, stream_input
from bilm_client._core.settings import Deadline, ResultTimeout, Settings
from bilm_client._transport.base import AsyncTransport
from bilm_client._transport.coalescing_async import AsyncCoalescing
from bilm_client._transport.grpc_async import GrpcAsyncTransport
from bilm_client._transport.stream_async import AsyncStream
from bilm_client.errors import ModelVersionError, SentenceError, ServiceError
from bilm_client.policy import DEFAULT_KEEPALIVE, DEFAULT_RETRY, Balance, Keepalive, RetryPolicy
from bilm_client.results import Embedding, HealthStatus, ModelInfo


class AsyncTransportClient:
    """Embeds sentences over any transport; `AsyncClient` is the one for a server's address.

    It pickles as what it is made from. Arguments are those of `bilm_client.client.TransportClient`.
    """

    def __init__(
        self,
        settings: Settings,
        new_transport: Callable[[Settings], AsyncTransport],
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._new_transport = new_transport
        self._uniform = uniform
        self._transport = new_transport(settings)
        self._model_info: ModelInfo | None = None
        self._priority = StatedPriority()
        self._coalescing = AsyncCoalescing(settings.coalesce_s, self._transport.embed) if settings.coalesce_s else None

    def __getstate__(self) -> dict[str, Any]:
        self._settings.check_picklable()
        return {"settings": self._settings, "new_transport": self._new_transport}

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        AsyncTransportClient.__init__(self, **arguments)

    async def __aenter__(self) -> Self:
        self._transport.check_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection and end the calls under way with ClientClosedError; again does nothing."""
        await self._transport.close()
        if self._coalescing is not None:
            self._coalescing.close()

    @overload
    async def embed(
        self,
        sentences: str | Chosen | Iterable[Sentence],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EmbedKeywords],
    ) -> list[Embedding]: ...
    @overload
    async def embed(
        self,
        sentences: str | Chosen | Iterable[Sentence],
        *,
        on_error: Literal["return"],
        **options: Unpack[EmbedKeywords],
    ) -> list[Embedding | SentenceError]: ...
    @keywords_of(EmbedArguments)
    async def embed(
        self, sentences: str | Chosen | Iterable[Sentence], **keywords: Any
    ) -> list[Embedding] | list[Embedding | SentenceError]:
        """Embed sentences, a few requests at a time, all by one version of the model.

        Arguments, result and exceptions are those of `Client.embed`. Cancelling the task cancels its requests.
        """
        self._transport.check_open()
        arguments = parse_keywords(EmbedArguments, "embed", keywords)
        job = embed_job(self._settings, sentences, arguments)
        deadline = self._settings.deadline(arguments.timeout_s)
        if not job.inputs:
            return []
        info = self._model_info or await self._fetch_model_info(deadline)
        job.plan(info, self._priority.of(arguments, info.features))
        await self._run_shared(job, deadline)
        await self._run_parts(job, deadline)
        await self._run_by_stream(job, deadline)
        return job.results()

    @overload
    def embed_stream(
        self,
        sentences: Iterable[Sentence] | AsyncIterable[Sentence],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[StreamKeywords],
    ) -> AsyncGenerator[Embedding, None]: ...
    @overload
    def embed_stream(
        self,
        sentences: Iterable[Sentence] | AsyncIterable[Sentence],
        *,
        on_error: Literal["return"],
        **options: Unpack[StreamKeywords],
    ) -> AsyncGenerator[Embedding | SentenceError, None]: ...
    @keywords_of(StreamArguments)
    def embed_stream(
        self, sentences: Iterable[Sentence] | AsyncIterable[Sentence], **keywords: Any
    ) -> AsyncGenerator[Any, None]:
        """Embed sentences as they come, in bounded memory, over connections that may break.

        Arguments, results and exceptions are those of `Client.embed_stream`, and `sentences` may be an asynchronous
        iterable too; it is read while results are awaited, never further ahead than `window` and
        `window_tokens`. Leaving the iterator
        before its end cancels the call once it is closed: at once by `aclose()` (see `contextlib.aclosing`), else when
        the event loop finalises it.
        """
        self._transport.check_open()
        check_iterable(sentences)
        if not isinstance(sentences, Iterable | AsyncIterable):
            raise TypeError(f"sentences must be an iterable of sentences, got {type(sentences).__name__}")
        arguments = parse_keywords(StreamArguments, "embed_stream", keywords)
        session = ResumableSession(arguments, self._settings, uniform=self._uniform)
        inputs = _parsed(sentences, arguments.return_states)
        return self._stream(session, inputs, self._settings.result_timeout(arguments.timeout_s))

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Ask the server about the client's model; as `Client.model_info`."""
        return await self._fetch_model_info(self._settings.deadline(timeout_s))

    async def list_models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """Ask the server about every model that it serves, the default one first; as `Client.list_models`."""
        response = await self._transport.list_models(self._settings.deadline(timeout_s))
        return tuple(map(ModelInfo.from_proto, response.models))

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """Ask the server how it is, in one attempt; as `Client.health`."""
        self._transport.check_open()
        return await self._transport.check_health(service, self._settings.deadline(timeout_s))

    async def _run_shared(self, job: EmbedJob, deadline: Deadline) -> None:
        """Send the sentences with those of other calls, where they may go; otherwise they stay for `_run_parts`."""
        if self._coalescing is None or not self._coalescing.accepts(job, deadline) or (part := job.take()) is None:
            return
        try:
            shared = await self._coalescing.embed(job, deadline)
        except ServiceError as error:
            self._note_failure(error)
            job.fail(part, error)
        else:
            if shared is None:
                job.put_back(part)
            else:
                job.take_results(part, shared.results, shared.model_version)

    async def _run_parts(self, job: EmbedJob, deadline: Deadline) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                while (part := job.take()) is not None:
                    if not tasks and not job.takes_more:  # alone, it needs no task
                        await self._run_part(job, part, deadline)
                        continue
                    tasks.add(asyncio.ensure_future(self._run_part(job, part, deadline)))
                if not tasks:
                    return
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_part(self, job: EmbedJob, part: range, deadline: Deadline) -> None:
        try:
            response = await self._transport.embed(job.request(part), deadline)
        except ServiceError as error:
            self._note_failure(error)
            job.fail(part, error)
        else:
            job.succeed(part, response)

    async def _run_by_stream(self, job: EmbedJob, deadline: Deadline) -> None:
        if not job.by_stream:
            return
        session = stream_by_job(self._settings, job, self._uniform)
        inputs = (job.inputs[index] for index in job.by_stream)
        indices = iter(job.by_stream)
        async with aclosing(self._stream(session, inputs, ResultTimeout(None, deadline))) as outcomes:
            async for outcome in outcomes:
                index = next(indices)
                job.settle(index, at_index(outcome, index))

    def _stream(
        self, session: ResumableSession, inputs: Iterator[Input] | AsyncIterator[Input], timeout: ResultTimeout
    ) -> AsyncGenerator[Outcome, None]:
        return AsyncStream(
            session,
            inputs,
            open_stream=self._transport.open_stream,
            wait=self._transport.wait,
            timeout=timeout,
            learn=partial(self._learn, session, timeout),
            failed=self._note_failure,
        ).run()

    async def _learn(self, session: ResumableSession, timeout: ResultTimeout) -> None:
        info = self._model_info or await self._fetch_model_info(timeout.call_deadline())
        session.learn(info.features, self._priority.of(session.options, info.features))

    async def _fetch_model_info(self, deadline: Deadline) -> ModelInfo:
        request = pb.GetModelRequest(
            model=self._settings.model, expected_model_version=self._settings.expected_model_version
        )
        try:
            self._model_info = info = ModelInfo.from_proto(await self._transport.get_model(request, deadline))
        except ServiceError as error:
            self._note_failure(error)
            raise
        return info

    def _note_failure(self, error: ServiceError) -> None:
        if isinstance(error, ModelVersionError) or self._settings.may_lack_model(error):
            self._model_info = None


class AsyncClient(AsyncTransportClient):
    """Embeds sentences through a bilm-serve server; many tasks of one event loop may use one client at once.

    The channel opens with the first call and belongs to that call's loop. Close the client when it is done with, best
    by `async with`.

    Arguments and methods are those of `bilm_client.Client`, and it pickles as its arguments, too. A forked process
    can't use its parent's: gRPC's asynchronous side doesn't survive a fork. While a process has one open, its forks can
    use no AsyncClient at all; each call there raises ForkedError.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        balance: Balance = "first",
        model: str = "",
        expected_model_version: str = "",
        timeout_s: float = 60.0,
        retry: RetryPolicy = DEFAULT_RETRY,
        keepalive: Keepalive = DEFAULT_KEEPALIVE,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        channel_options: Sequence[tuple[str, Any]] = (),
        proxy: bool = True,
        coalesce_ms: float | None = None,
    ) -> None:
        settings = Settings(
            target=as_target(target),
            balance=balance,
            model=model,
            expected_model_version=expected_model_version,
            timeout_s=timeout_s,
            retry=retry,
            keepalive=keepalive,
            credentials=credentials,
            token=token,
            metadata=metadata,
            channel_options=channel_options,
            proxy=proxy,
            coalesce_ms=coalesce_ms,
        )
        super().__init__(settings, GrpcAsyncTransport)


def _parsed(
    sentences: Iterable[Sentence] | AsyncIterable[Sentence], return_state: bool
) -> Iterator[Input] | AsyncIterator[Input]:
    if isinstance(sentences, AsyncIterable):
        return _parsed_asynchronously(sentences, return_state)
    return (stream_input(sentence, index, return_state) for index, sentence in enumerate(sentences))


async def _parsed_asynchronously(sentences: AsyncIterable[Sentence], return_state: bool) -> AsyncIterator[Input]:
    index = 0
    async for sentence in sentences:
        yield stream_input(sentence, index, return_state)
        index += 1
