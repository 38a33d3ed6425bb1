"""The asynchronous client: the same surface as `bilm_client.Client`, with awaits."""

import asyncio
import os
import random
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Literal, Self, Unpack, overload

import grpc
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bilm_client import _surface
from bilm_client._inputs import Input, Sentence
from bilm_client._job import EmbedJob, Outcome, at_index
from bilm_client._options import DTypeName, LayersName, OnError, PoolName, ScalarMix
from bilm_client._session import StreamSession
from bilm_client._settings import Deadline, Patience, Settings
from bilm_client._stream_async import AsyncStream
from bilm_client._surface import RETURN_STATE_EVERY, WINDOW, WINDOW_TOKENS, EmbedKeywords, StreamKeywords
from bilm_client.errors import (
    BilmError,
    ClientClosedError,
    ForkedError,
    ModelVersionError,
    SentenceError,
    ServiceError,
    service_error,
)
from bilm_client.policy import DEFAULT_KEEPALIVE, DEFAULT_RETRY, Keepalive, RetryPolicy
from bilm_client.results import Embedding, HealthStatus, ModelInfo


class AsyncClient:
    """Embeds sentences through a bilm-serve server; many tasks of one event loop may use one client at once.

    The channel opens with the first call and belongs to that call's loop. Close the client when it is done with, best
    by `async with`.

    Arguments and methods are those of `bilm_client.Client`, and it pickles as its arguments, too. A forked process
    can't use its parent's: gRPC's asynchronous side doesn't survive a fork. While a process has one open, its forks can
    use no AsyncClient at all; each call there raises ForkedError.
    """

    def __init__(
        self,
        target: str,
        *,
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
    ) -> None:
        self._settings = Settings(
            target=target,
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
        )
        self._process_id = 0  # that opened the channel; 0: none has
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._stream_channel: grpc.Channel | None = None
        self._embed_stub: embed_pb2_grpc.EmbedServiceAsyncStub | None = None
        self._model_info: ModelInfo | None = None
        self._uniform = random.random
        self._sleep = asyncio.sleep

    def __getstate__(self) -> dict[str, Any]:
        return self._settings.to_pickle()

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        AsyncClient.__init__(self, **arguments)

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection and end the calls under way with ClientClosedError; again does nothing."""
        if self._process_id not in (0, os.getpid()):
            return  # the channel is the parent's
        self._closed = True
        stream_channel, self._stream_channel = self._stream_channel, None
        if stream_channel is not None:
            stream_channel.close()
        channel, self._channel, self._embed_stub = self._channel, None, None
        if channel is not None:
            await channel.close()

    @overload
    async def embed(
        self,
        sentences: str | Iterable[Sentence],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EmbedKeywords],
    ) -> list[Embedding]: ...
    @overload
    async def embed(
        self, sentences: str | Iterable[Sentence], *, on_error: Literal["return"], **options: Unpack[EmbedKeywords]
    ) -> list[Embedding | SentenceError]: ...
    async def embed(
        self,
        sentences: str | Iterable[Sentence],
        *,
        layers: LayersName = "all",
        pool: PoolName = "none",
        dtype: DTypeName = "float32",
        mix: ScalarMix | None = None,
        l2_normalize: bool = False,
        on_error: OnError = "raise",
        states: Sequence[bytes | None] | None = None,
        return_states: bool = False,
        timeout_s: float | None = None,
    ) -> list[Embedding] | list[Embedding | SentenceError]:
        """Embed sentences, a few requests at a time, all by one version of the model.

        Arguments, result and exceptions are those of `Client.embed`. Cancelling the task cancels its requests.
        """
        self._check_open()
        job = _surface.embed_job(
            self._settings,
            sentences,
            layers=layers,
            pool=pool,
            dtype=dtype,
            mix=mix,
            l2_normalize=l2_normalize,
            on_error=on_error,
            states=states,
            return_states=return_states,
        )
        deadline = self._settings.deadline(timeout_s)
        if not job.inputs:
            return []
        job.plan(self._model_info or await self._fetch_model_info(deadline))
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
    def embed_stream(
        self,
        sentences: Iterable[Sentence] | AsyncIterable[Sentence],
        *,
        layers: LayersName = "all",
        pool: PoolName = "none",
        dtype: DTypeName = "float32",
        mix: ScalarMix | None = None,
        l2_normalize: bool = False,
        on_error: OnError = "raise",
        return_states: bool = False,
        carry_state: bool = False,
        initial_state: bytes | None = None,
        return_state_every: int = RETURN_STATE_EVERY,
        window: int = WINDOW,
        window_tokens: int = WINDOW_TOKENS,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Embed sentences as they come, in bounded memory, over connections that may break.

        Arguments, results and exceptions are those of `Client.embed_stream`, and `sentences` may be an asynchronous
        iterable too; it is read while results are awaited, never further ahead than `window` and
        `window_tokens`. Leaving the iterator
        before its end cancels the call once it is closed: at once by `aclose()` (see `contextlib.aclosing`), else when
        the event loop finalises it.
        """
        self._check_open()
        _surface.check_iterable(sentences)
        if not isinstance(sentences, Iterable | AsyncIterable):
            raise TypeError(f"sentences must be an iterable of sentences, got {type(sentences).__name__}")
        session = _surface.stream_session(
            self._settings,
            layers=layers,
            pool=pool,
            dtype=dtype,
            mix=mix,
            l2_normalize=l2_normalize,
            on_error=on_error,
            return_states=return_states,
            carry_state=carry_state,
            initial_state=initial_state,
            return_state_every=return_state_every,
            window=window,
            window_tokens=window_tokens,
            uniform=self._uniform,
        )
        inputs = _parsed(sentences, return_states)
        return self._stream(session, inputs, self._settings.patience(timeout_s))

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Ask the server what it serves; as `Client.model_info`."""
        return await self._fetch_model_info(self._settings.deadline(timeout_s))

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """Ask the server how it is, in one attempt; as `Client.health`."""
        stub: Any = health_pb2_grpc.HealthStub(self._open_channel())
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._unary(stub.Check, request, self._settings.deadline(timeout_s))
        except ServiceError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return HealthStatus.SERVICE_UNKNOWN
            raise
        return HealthStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def _run_parts(self, job: EmbedJob, deadline: Deadline) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                while (part := job.take()) is not None:
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
            response = await self._unary(self._stub().Embed, job.request(part), deadline)
        except ServiceError as error:
            job.fail(part, error)
        else:
            job.succeed(part, response)

    async def _run_by_stream(self, job: EmbedJob, deadline: Deadline) -> None:
        if not job.by_stream:
            return
        session = _surface.by_stream_session(self._settings, job, self._uniform)
        inputs = (job.inputs[index] for index in job.by_stream)
        indices = iter(job.by_stream)
        async with aclosing(self._stream(session, inputs, Patience(None, deadline))) as outcomes:
            async for outcome in outcomes:
                index = next(indices)
                job.settle(index, at_index(outcome, index))

    def _stream(
        self,
        session: StreamSession,
        inputs: Iterator[Input] | AsyncIterator[Input],
        patience: Patience,
    ) -> AsyncGenerator[Outcome, None]:
        def connect(requests: Iterator[pb.EmbedStreamRequest]) -> Any:
            try:
                return self._stream_stub().EmbedStream(requests, **self._call_arguments(patience.deadline))
            except ValueError as error:
                raise self._translated(error) from error

        return AsyncStream(
            session, inputs, connect=connect, translate=self._translated, sleep=self._sleep, patience=patience
        ).run()

    async def _fetch_model_info(self, deadline: Deadline) -> ModelInfo:
        request = pb.GetModelRequest(
            model=self._settings.model, expected_model_version=self._settings.expected_model_version
        )
        self._model_info = info = ModelInfo.from_proto(await self._unary(self._stub().GetModel, request, deadline))
        return info

    async def _unary(self, method: Any, request: Any, deadline: Deadline) -> Any:
        try:
            call = method(request, **self._call_arguments(deadline))
            return await call
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            raise self._translated(error) from error
        except asyncio.CancelledError:
            # gRPC raises this for a call that ended CANCELLED as well as for a task that is being cancelled.
            if _is_being_cancelled():
                raise
            raise self._translated(await _finished_call(call)) from None

    def _call_arguments(self, deadline: Deadline) -> dict[str, Any]:
        return {"timeout": deadline.remaining_s(), "metadata": self._settings.call_metadata()}

    def _stub(self) -> "embed_pb2_grpc.EmbedServiceAsyncStub":
        self._check_open()
        if self._embed_stub is None:
            self._embed_stub = embed_pb2_grpc.EmbedServiceStub(self._open_channel())
        return self._embed_stub

    def _stream_stub(self) -> embed_pb2_grpc.EmbedServiceStub:
        # A synchronous channel (see _connection); gRPC lets it share the other one's connection.
        self._check_open()
        if self._stream_channel is None:
            self._process_id = os.getpid()
            self._stream_channel = self._settings.new_channel()
        return embed_pb2_grpc.EmbedServiceStub(self._stream_channel)

    def _open_channel(self) -> grpc.aio.Channel:
        self._check_open()
        if self._channel is None:
            self._process_id = os.getpid()
            self._channel = self._settings.new_aio_channel()
            _CHANNELS.add(self._channel)
        return self._channel

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosedError("the client is closed")
        if _CHANNELS.inherited or self._process_id not in (0, os.getpid()):
            raise ForkedError(
                "this process was forked while an AsyncClient was open, so gRPC's asynchronous side doesn't work here: "
                "use Client, start the process by 'spawn', or close every AsyncClient before the fork"
            )

    def _translated(self, error: Any) -> BilmError:
        """The package's exception for gRPC's, which says by UsageError or ValueError that the channel is closed."""
        if self._closed:
            return ClientClosedError("the client was closed during the call")
        if isinstance(error, grpc.aio.UsageError | ValueError):
            raise error
        failure = service_error(error)
        if isinstance(failure, ModelVersionError):
            self._model_info = None
        return failure


class _Channels:
    """The asynchronous channels that are open.

    Attributes:
        inherited: Whether some were at the fork that made this process.
    """

    def __init__(self) -> None:
        self.inherited = False
        self._open: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()

    def add(self, channel: grpc.aio.Channel) -> None:
        """Count a channel for as long as it exists."""
        self._open.add(channel)

    def after_fork(self) -> None:
        """Take note of what the child process has inherited."""
        self.inherited = self.inherited or len(self._open) > 0


_CHANNELS = _Channels()
os.register_at_fork(after_in_child=_CHANNELS.after_fork)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _finished_call(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call that has ended."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )


def _parsed(
    sentences: Iterable[Sentence] | AsyncIterable[Sentence], return_state: bool
) -> Iterator[Input] | AsyncIterator[Input]:
    if isinstance(sentences, AsyncIterable):
        return _parsed_asynchronously(sentences, return_state)
    return (_surface.stream_input(sentence, index, return_state) for index, sentence in enumerate(sentences))


async def _parsed_asynchronously(sentences: AsyncIterable[Sentence], return_state: bool) -> AsyncIterator[Input]:
    index = 0
    async for sentence in sentences:
        yield _surface.stream_input(sentence, index, return_state)
        index += 1
