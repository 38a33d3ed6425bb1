"""The synchronous client."""

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from bilm_client._transport.base import PendingEmbed, SyncTransport
from bilm_client._transport.coalescing_sync import SyncCoalescing
from bilm_client._transport.grpc_sync import GrpcSyncTransport
from bilm_client._transport.stream_sync import SyncStream
from bilm_client.errors import ModelVersionError, SentenceError, ServiceError
from bilm_client.policy import DEFAULT_KEEPALIVE, DEFAULT_RETRY, Balance, Keepalive, RetryPolicy
from bilm_client.results import Embedding, HealthStatus, ModelInfo


class TransportClient:
    """Embeds sentences over any transport; `Client` is the one for a server's address.

    It pickles as what it is made from.

    Args:
        settings: What is asked for, how long it may take and how it is tried again.
        new_transport: Makes the wire from the settings, here and in a process that the client is pickled to.
        uniform: Numbers in [0, 1) for the jitter of retries.
    """

    def __init__(
        self,
        settings: Settings,
        new_transport: Callable[[Settings], SyncTransport],
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._new_transport = new_transport
        self._uniform = uniform
        self._transport = new_transport(settings)
        self._model_info: ModelInfo | None = None
        self._priority = StatedPriority()
        self._coalescing: SyncCoalescing | None = None
        if settings.coalesce_s:
            self._coalescing = SyncCoalescing(settings.coalesce_s, self._transport)

    def __getstate__(self) -> dict[str, Any]:
        self._settings.check_picklable()
        return {"settings": self._settings, "new_transport": self._new_transport}

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        TransportClient.__init__(self, **arguments)

    def __enter__(self) -> Self:
        self._transport.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the calls under way with ClientClosedError; again does nothing."""
        self._transport.close()
        if self._coalescing is not None:
            self._coalescing.close()

    @overload
    def embed(
        self,
        sentences: str | Chosen | Iterable[Sentence],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EmbedKeywords],
    ) -> list[Embedding]: ...
    @overload
    def embed(
        self,
        sentences: str | Chosen | Iterable[Sentence],
        *,
        on_error: Literal["return"],
        **options: Unpack[EmbedKeywords],
    ) -> list[Embedding | SentenceError]: ...
    @keywords_of(EmbedArguments)
    def embed(  # noqa: D417 - the keywords are described one by one
        self, sentences: str | Chosen | Iterable[Sentence], **keywords: Any
    ) -> list[Embedding] | list[Embedding | SentenceError]:
        """Embed sentences, in as many requests as the limits need, all by one version of the model.

        Args:
            sentences: Sentences, each a str (text, which the server tokenises), a sequence of str (its tokens), or a
                `Chosen`, of which chosen tokens come back; a single str or `Chosen` is one sentence. A flat list of str
                is a list of texts: one tokenised sentence is `[["its", "tokens"]]`.
            layers: "all" layers, the "top" one, their "average", or a "mix" as `mix` says.
            pool: "none": a vector for each token; "mean" or "max" over the tokens: one for the sentence, or for each
                span of a `Chosen`.
            dtype: Number format on the wire. "bfloat16" arrives as float32 with bfloat16's precision.
            mix: The scalar mix, with layers="mix" only.
            l2_normalize: Scale each vector to length 1.
            priority: "interactive", or "batch" for what may take long: a server computes it when nothing interactive
                waits, as far as it can ("Two priorities" in docs/client.md).
            on_error: "raise" the SentenceError of a sentence that fails, or "return" it in the sentence's place.
            states: A state (or None) for each sentence, to continue from.
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
        self._transport.check_open()
        arguments = parse_keywords(EmbedArguments, "embed", keywords)
        job = embed_job(self._settings, sentences, arguments)
        deadline = self._settings.deadline(arguments.timeout_s)
        if not job.inputs:
            return []
        info = self._model_info or self._fetch_model_info(deadline)
        job.plan(info, self._priority.of(arguments, info.features))
        with self._transport.calls():
            self._run_shared(job, deadline)
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
    @keywords_of(StreamArguments)
    def embed_stream(  # noqa: D417 - the keywords are described one by one
        self, sentences: Iterable[Sentence], **keywords: Any
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
            priority: As for `embed`.
            on_error: As for `embed`; a raised error ends the stream.
            return_states: Return the state after each sentence.
            carry_state: Each sentence continues from the state after the one before it.
            initial_state: The state that the first one continues from, with `carry_state`.
            return_state_every: With `carry_state`, the results n, 2n, … bring their state; after a break the client
                continues from the last one, and holds the sentences since then to read them again.
            window: Sentences that are under way at once, counted until their result is taken.
            window_tokens: Tokens under way from which on no further sentence is read; text is counted by an estimate.
            timeout_s: Longest wait for a next result in seconds, through breaks; None: the client's default. The stream
                as a whole may take longer.

        Returns:
            An iterator of Embedding (or SentenceError, with on_error="return") in input order.

        Raises:
            SentenceError: A sentence failed, with on_error="raise".
            ServiceError: The stream failed and could not be resumed.
            UnsupportedError: A `Chosen` came behind other sentences that are pooled, and the server can't choose.
            ClientClosedError: The client is closed.
            TypeError: An argument has the wrong type; the message names it.
            ValueError: An argument has a value that can't be; the message names it.
        """
        self._transport.check_open()
        check_iterable(sentences)
        arguments = parse_keywords(StreamArguments, "embed_stream", keywords)
        session = ResumableSession(arguments, self._settings, uniform=self._uniform)
        # iter() first: a wrong type is raised here, not by the first result.
        sentences = iter(sentences)
        states = arguments.return_states
        inputs = (stream_input(sentence, index, states) for index, sentence in enumerate(sentences))
        return self._stream(session, inputs, self._settings.result_timeout(arguments.timeout_s))

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Ask the server about the client's model.

        Args:
            timeout_s: Seconds for the call; None: the client's default.

        Raises:
            ModelNotFoundError: The server has no model of that name.
            ServiceError: The call failed in another way; see bilm_client.errors.
            ClientClosedError: The client is closed.
        """
        return self._fetch_model_info(self._settings.deadline(timeout_s))

    def list_models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """Ask the server about every model that it serves, the default one first, the others by name.

        Arguments and exceptions are those of `model_info`, but that nothing depends on the client's model.
        """
        response = self._transport.list_models(self._settings.deadline(timeout_s))
        return tuple(map(ModelInfo.from_proto, response.models))

    def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """Ask the server how it is, in one attempt.

        Args:
            service: Name of a service; "": the server as a whole; "model:NAME": one of its models.
            timeout_s: Seconds for the call; None: the client's default.

        Raises:
            UnavailableError: The server can't be reached.
            ServiceError: The call failed in another way.
            ClientClosedError: The client is closed.
        """
        self._transport.check_open()
        return self._transport.check_health(service, self._settings.deadline(timeout_s))

    def _run_shared(self, job: EmbedJob, deadline: Deadline) -> None:
        """Send the sentences with those of other calls, where they may go; otherwise they stay for `_run_parts`."""
        if self._coalescing is None or not self._coalescing.accepts(job, deadline) or (part := job.take()) is None:
            return
        try:
            shared = self._coalescing.embed(job, deadline)
        except ServiceError as error:
            self._note_failure(error)
            job.fail(part, error)
        else:
            if shared is None:
                job.put_back(part)
            else:
                job.take_results(part, shared.results, shared.model_version)

    def _run_parts(self, job: EmbedJob, deadline: Deadline) -> None:
        calls: deque[tuple[range, PendingEmbed]] = deque()
        try:
            while True:
                while (part := job.take()) is not None:
                    if not calls and not job.takes_more:
                        self._take_response(job, part, partial(self._transport.embed, job.request(part), deadline))
                    else:
                        calls.append((part, self._transport.start_embed(job.request(part), deadline)))
                if not calls:
                    return
                part, call = calls.popleft()
                self._take_response(job, part, call.result)
        finally:
            for _, call in calls:
                call.cancel()

    def _take_response(self, job: EmbedJob, part: range, receive: Callable[[], pb.EmbedResponse]) -> None:
        try:
            response = receive()
        except ServiceError as error:
            self._note_failure(error)
            job.fail(part, error)
        else:
            job.succeed(part, response)

    def _run_by_stream(self, job: EmbedJob, deadline: Deadline) -> None:
        if not job.by_stream:
            return
        session = stream_by_job(self._settings, job, self._uniform)
        inputs = (job.inputs[index] for index in job.by_stream)
        outcomes = self._stream(session, inputs, ResultTimeout(None, deadline))
        for index, outcome in zip(job.by_stream, outcomes, strict=True):
            job.settle(index, at_index(outcome, index))

    def _stream(
        self, session: ResumableSession, inputs: Iterator[Input], timeout: ResultTimeout
    ) -> Generator[Outcome, None, None]:
        return SyncStream(
            session,
            inputs,
            open_stream=self._transport.open_stream,
            wait=self._transport.wait,
            timeout=timeout,
            learn=partial(self._learn, session, timeout),
            failed=self._note_failure,
        ).run()

    def _learn(self, session: ResumableSession, timeout: ResultTimeout) -> None:
        info = self._model_info or self._fetch_model_info(timeout.call_deadline())
        session.learn(info.features, self._priority.of(session.options, info.features))

    def _fetch_model_info(self, deadline: Deadline) -> ModelInfo:
        request = pb.GetModelRequest(
            model=self._settings.model, expected_model_version=self._settings.expected_model_version
        )
        try:
            self._model_info = info = ModelInfo.from_proto(self._transport.get_model(request, deadline))
        except ServiceError as error:
            self._note_failure(error)
            raise
        return info

    def _note_failure(self, error: ServiceError) -> None:
        if isinstance(error, ModelVersionError) or self._settings.may_lack_model(error):
            self._model_info = None


class Client(TransportClient):
    """Embeds sentences through a bilm-serve server; many threads may use one client at once.

    The channel opens with the first call. Close the client when it is done with, best by `with`.

    A forked process may use its parent's client: it opens its own channel. A stream can't be read there that was opened
    before the fork. A client pickles as its arguments, the token among them.

    Args:
        target: The server's address: "host:port", "dns:///name:port", "unix:/path" and what else gRPC knows. Or the
            addresses of several servers, IP:PORT each, as a sequence or separated by commas.
        balance: How calls are spread over several addresses, given or found by DNS: all to the "first" that accepts a
            connection, in turns ("round_robin"), or in turns by the servers' load reports ("weighted"). The latter two
            leave out servers on which the model isn't SERVING. See "Several servers" in docs/client.md.
        model: Name of the model that embeds; "": the server's default one. See "Several models" in docs/client.md.
        expected_model_version: Version that the caller relies on; another one raises ModelVersionError. "": any.
        timeout_s: Seconds that a call may take, where the call itself names none; `math.inf`: no deadline.
        retry: How calls are retried and streams resumed.
        keepalive: Pings on idle connections.
        credentials: TLS credentials; None: plaintext.
        token: Bearer token, sent as `authorization` metadata; over plaintext anyone on the way can read it.
        metadata: Further metadata of every call.
        channel_options: Further gRPC channel arguments; they replace the client's own. A `grpc.service_config` replaces
            the fields that it has.
        proxy: Whether the proxy that `http_proxy` and its siblings name is used, as gRPC does. A Unix socket or a
            loopback address is always reached without one.
        coalesce_ms: Longest wait of a call of `embed` for others to share a request with, in milliseconds; None or 0:
            each call has requests of its own. See "Many small calls" in docs/client.md.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument has a value that can't be; the message names it.
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
        super().__init__(settings, GrpcSyncTransport)
