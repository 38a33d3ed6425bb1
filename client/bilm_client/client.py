"""The synchronous client."""

import os
import random
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, Self, Unpack, overload

import grpc
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from grpc_health.v1 import health_pb2

from bilm_client import _surface
from bilm_client._forks import CALL_GATE
from bilm_client._inputs import Input, Sentence
from bilm_client._job import EmbedJob, Outcome, at_index
from bilm_client._link import Link
from bilm_client._options import DTypeName, LayersName, OnError, PoolName, ScalarMix
from bilm_client._session import StreamSession
from bilm_client._settings import Deadline, Patience, Settings
from bilm_client._stream_sync import SyncStream
from bilm_client._surface import RETURN_STATE_EVERY, WINDOW, WINDOW_TOKENS, EmbedKeywords, StreamKeywords
from bilm_client.errors import (
    BilmError,
    ClientClosedError,
    ModelVersionError,
    SentenceError,
    ServiceError,
    service_error,
)
from bilm_client.policy import DEFAULT_KEEPALIVE, DEFAULT_RETRY, Keepalive, RetryPolicy
from bilm_client.results import Embedding, HealthStatus, ModelInfo


class Client:
    """Embeds sentences through a bilm-serve server; many threads may use one client at once.

    The channel opens with the first call. Close the client when it is done with, best by `with`.

    A forked process may use its parent's client: it opens its own channel. A stream can't be read there that was opened
    before the fork. A client pickles as its arguments, the token among them.

    Args:
        target: The server's address: "host:port", "dns:///name:port", "unix:/path" and what else gRPC knows.
        model: Name of the model; "": the server's only one.
        expected_model_version: Version that the caller relies on; another one raises ModelVersionError. "": any.
        timeout_s: Seconds that a call may take, where the call itself names none; `math.inf`: no deadline.
        retry: How calls are retried and streams resumed.
        keepalive: Pings on idle connections.
        credentials: TLS credentials; None: plaintext.
        token: Bearer token, sent as `authorization` metadata; over plaintext anyone on the way can read it.
        metadata: Further metadata of every call.
        channel_options: Further gRPC channel arguments; they replace the client's own.
        proxy: Whether the proxy that `http_proxy` and its siblings name is used, as gRPC does. A Unix socket or a
            loopback address is always reached without one.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument has a value that can't be; the message names it.
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
        self._links: dict[int, Link] = {}  # by process
        self._model_info: ModelInfo | None = None
        self._uniform = random.random

    def __getstate__(self) -> dict[str, Any]:
        return self._settings.to_pickle()

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        Client.__init__(self, **arguments)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the calls under way with ClientClosedError; again does nothing."""
        self._link.close()

    @overload
    def embed(
        self,
        sentences: str | Iterable[Sentence],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EmbedKeywords],
    ) -> list[Embedding]: ...
    @overload
    def embed(
        self, sentences: str | Iterable[Sentence], *, on_error: Literal["return"], **options: Unpack[EmbedKeywords]
    ) -> list[Embedding | SentenceError]: ...
    def embed(
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
        """Embed sentences, in as many requests as the limits need, all by one version of the model.

        Args:
            sentences: Sentences, each a str (text, which the server tokenises) or a sequence of str (its tokens); a
                single str is one sentence. A flat list of str is a list of texts: one tokenised sentence is
                `[["its", "tokens"]]`.
            layers: "all" layers, the "top" one, their "average", or a "mix" as `mix` says.
            pool: "none": a vector for each token; "mean" or "max" over the tokens: one for the sentence.
            dtype: Number format on the wire. "bfloat16" arrives as float32 with bfloat16's precision.
            mix: The scalar mix, with layers="mix" only.
            l2_normalize: Scale each vector to length 1.
            on_error: "raise" the SentenceError of a sentence that fails, or "return" it in the sentence's place.
            states: A state (or None) for each sentence, to go on from.
            return_states: Return the state after each sentence.
            timeout_s: Seconds for the whole call; None: the client's default.

        Returns:
            One Embedding for each sentence, in order.

        Raises:
            SentenceError: A sentence failed, with on_error="raise".
            ServiceError: The call failed; see bilm_client.errors.
            ClientClosedError: The client is closed.
            TypeError: An argument has the wrong type; the message names it.
            ValueError: An argument has a value that can't be; the message names it.
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
        job.plan(self._model_info or self._fetch_model_info(deadline))
        with CALL_GATE.call():
            self._run_parts(job, deadline)
        self._run_by_stream(job, deadline)
        return job.results()

    @overload
    def embed_stream(
        self,
        sentences: Iterable[Sentence],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[StreamKeywords],
    ) -> Generator[Embedding, None, None]: ...
    @overload
    def embed_stream(
        self, sentences: Iterable[Sentence], *, on_error: Literal["return"], **options: Unpack[StreamKeywords]
    ) -> Generator[Embedding | SentenceError, None, None]: ...
    def embed_stream(
        self,
        sentences: Iterable[Sentence],
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
    ) -> Generator[Any, None, None]:
        """Embed sentences as they come, in bounded memory, over connections that may break.

        Nothing is read or sent before the first result is asked for. The input is read in the caller's thread, never
        further ahead than `window` and `window_tokens`. A stream that breaks is resumed as the client's RetryPolicy
        says; attempts are counted anew after each result. Closing the iterator, or dropping it, cancels the call, and
        so does the end of the process.

        Results are received as fast as the server sends them, whether they are taken or not, so any number of streams
        may be read in turns. Until they are taken they lie in the client's memory: at most those of `window_tokens`
        tokens and of one sentence more, each token 4 bytes (2 with float16 and bfloat16) × layers × width; by default
        192 MiB for all layers of a model of the original size.

        Args:
            sentences: Iterable of sentences, each as for `embed`.
            layers: As for `embed`.
            pool: As for `embed`.
            dtype: As for `embed`.
            mix: As for `embed`.
            l2_normalize: As for `embed`.
            on_error: As for `embed`; a raised error ends the stream.
            return_states: Return the state after each sentence.
            carry_state: Each sentence goes on from the state after the one before it.
            initial_state: The state that the first one goes on from, with `carry_state`.
            return_state_every: With `carry_state`, the results n, 2n, … bring their state; after a break the client
                goes on from the last one, and holds the sentences since then to read them again.
            window: Sentences that are under way at once, counted until their result is taken.
            window_tokens: Tokens under way from which on no further sentence is read; text is counted by an estimate.
            timeout_s: Longest wait for a next result in seconds, through breaks; None: the client's default. The stream
                as a whole may take longer.

        Returns:
            An iterator of Embedding (or SentenceError, with on_error="return") in input order.

        Raises:
            SentenceError: A sentence failed, with on_error="raise".
            ServiceError: The stream failed and could not be resumed.
            ClientClosedError: The client is closed.
            TypeError: An argument has the wrong type; the message names it.
            ValueError: An argument has a value that can't be; the message names it.
        """
        self._check_open()
        _surface.check_iterable(sentences)
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
        # iter() first: a wrong type is told here, not by the first result.
        sentences = iter(sentences)
        inputs = (_surface.stream_input(sentence, index, return_states) for index, sentence in enumerate(sentences))
        return self._stream(session, inputs, self._settings.patience(timeout_s))

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Ask the server what it serves.

        Args:
            timeout_s: Seconds for the call; None: the client's default.

        Raises:
            ServiceError: The call failed; see bilm_client.errors.
            ClientClosedError: The client is closed.
        """
        return self._fetch_model_info(self._settings.deadline(timeout_s))

    def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """Ask the server how it is, in one attempt.

        Args:
            service: Name of a service; "": the server as a whole.
            timeout_s: Seconds for the call; None: the client's default.

        Raises:
            UnavailableError: The server can't be reached.
            ServiceError: The call failed in another way.
            ClientClosedError: The client is closed.
        """
        stub = self._link.health_stub()
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = self._unary(stub.Check, request, self._settings.deadline(timeout_s))
        except ServiceError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return HealthStatus.SERVICE_UNKNOWN
            raise
        return HealthStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def _run_parts(self, job: EmbedJob, deadline: Deadline) -> None:
        stub = self._stub()
        calls: deque[tuple[range, Any]] = deque()
        try:
            while True:
                while (part := job.take()) is not None:
                    calls.append((part, self._send(stub, job, part, deadline)))
                if not calls:
                    return
                self._take_answer(job, *calls.popleft())
        finally:
            for _, call in calls:
                call.cancel()

    def _send(self, stub: embed_pb2_grpc.EmbedServiceStub, job: EmbedJob, part: range, deadline: Deadline) -> Any:
        try:
            return stub.Embed.future(job.request(part), **self._call_arguments(deadline))
        except ValueError as error:
            raise self._translated(error) from error

    def _take_answer(self, job: EmbedJob, part: range, call: Any) -> None:
        try:
            response = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            failure = self._translated(call)  # a future that ended CANCELLED raises an error without a status
            if not isinstance(failure, ServiceError):
                raise failure from error
            job.fail(part, failure)
        except BaseException:
            call.cancel()
            raise
        else:
            job.succeed(part, response)

    def _run_by_stream(self, job: EmbedJob, deadline: Deadline) -> None:
        if not job.by_stream:
            return
        session = _surface.by_stream_session(self._settings, job, self._uniform)
        inputs = (job.inputs[index] for index in job.by_stream)
        for index, outcome in zip(job.by_stream, self._stream(session, inputs, Patience(None, deadline)), strict=True):
            job.settle(index, at_index(outcome, index))

    def _stream(
        self, session: StreamSession, inputs: Iterator[Input], patience: Patience
    ) -> Generator[Outcome, None, None]:
        def connect(requests: Iterator[pb.EmbedStreamRequest]) -> Any:
            try:
                return self._stub().EmbedStream(requests, **self._call_arguments(patience.deadline))
            except ValueError as error:
                raise self._translated(error) from error

        return SyncStream(
            session, inputs, connect=connect, translate=self._translated, wait=self._wait, patience=patience
        ).run()

    def _fetch_model_info(self, deadline: Deadline) -> ModelInfo:
        request = pb.GetModelRequest(
            model=self._settings.model, expected_model_version=self._settings.expected_model_version
        )
        self._model_info = info = ModelInfo.from_proto(self._unary(self._stub().GetModel, request, deadline))
        return info

    def _unary(self, method: Any, request: Any, deadline: Deadline) -> Any:
        try:
            with CALL_GATE.call():
                return method(request, **self._call_arguments(deadline))
        except (grpc.RpcError, ValueError) as error:
            raise self._translated(error) from error

    def _call_arguments(self, deadline: Deadline) -> dict[str, Any]:
        return {"timeout": deadline.remaining_s(), "metadata": self._settings.call_metadata()}

    @property
    def _link(self) -> Link:
        """The link of the calling process; a fork takes its own and leaves its parent's locks and calls alone."""
        process_id = os.getpid()
        link = self._links.get(process_id)
        if link is None:
            closed = any(other.is_closed for other in tuple(self._links.values()))
            link = self._links.setdefault(process_id, Link(self._settings, closed))  # atomic: threads agree on one
        return link

    def _stub(self) -> embed_pb2_grpc.EmbedServiceStub:
        return self._link.stub()

    def _check_open(self) -> None:
        self._link.check_open()

    def _wait(self, timeout_s: float) -> None:
        self._link.wait(timeout_s)

    def _translated(self, error: Any) -> BilmError:
        """The package's exception for gRPC's; a call, or a ValueError by which gRPC says that the channel is closed."""
        if self._link.is_closed:
            return ClientClosedError("the client was closed during the call")
        if isinstance(error, ValueError):
            raise error
        failure = service_error(error)
        if isinstance(failure, ModelVersionError):
            self._model_info = None
        return failure
