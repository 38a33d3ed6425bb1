"""A client's wire without a network: calls go to an engine in this process.

A forked process has none of its parent's threads, so a model that was loaded before the fork is loaded again there,
with the first call. What a GPU holds can't be used in a fork at all.
"""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import grpc
from bilm_api.constants import MODEL_HEALTH, Reason
from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.settings import Deadline, Settings, deadline_passed
from bilm_client._transport.base import Deliver
from bilm_client.errors import ClientClosedError, ForkedError, ModelVersionError
from bilm_client.results import HealthStatus

from bilm_local.computing import ComputingThread, LocalCall, LocalResult
from bilm_local.loading import LocalModel, LocalSettings
from bilm_local.messages import description, embed_response
from bilm_local.sentences import LocalSentence, RefusedSentenceError, output_of, prepare
from bilm_local.streams import LocalStream


class LocalTransport:
    """A `SyncTransport` over an engine, which is loaded with the first call.

    Args:
        chosen: Which model computes.
        load: Loads it.
    """

    def __init__(
        self,
        chosen: LocalSettings,
        load: Callable[[LocalSettings], LocalModel],
        _settings: Settings | None = None,
    ) -> None:
        self._chosen = chosen
        self._load = load
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._forked_on_gpu = False
        self._thread: ComputingThread | None = None
        self._ending: weakref.finalize[[], LocalTransport] | None = None
        _TRANSPORTS.add(self)

    def check_open(self) -> None:
        """Raise ClientClosedError if the client is closed, ForkedError if it can't be used in this fork."""
        if self._closed.is_set():
            raise ClientClosedError("the client is closed")
        if self._forked_on_gpu:
            raise ForkedError(
                "the model was loaded on a GPU before this process was forked, and CUDA can't be used in a fork: start "
                "processes by spawn or forkserver, or embed in the parent after the fork only"
            )

    def calls(self) -> AbstractContextManager[None]:
        """Do nothing: a fork waits for the round under way only, which computes what calls of others need, too."""
        return nullcontext()

    def embed(self, request: pb.EmbedRequest, deadline: Deadline) -> pb.EmbedResponse:
        """Answer an Embed."""
        return self.start_embed(request, deadline).result()

    def start_embed(self, request: pb.EmbedRequest, deadline: Deadline) -> "LocalEmbed":
        """Tokenise here, and leave the rest to the thread."""
        thread, model = self._model(deadline, request.expected_model_version)
        output, batch = output_of(request.options), request.priority == pb.PRIORITY_BATCH
        prepared: list[LocalSentence | RefusedSentenceError] = []
        for message in request.sentences:
            try:
                prepared.append(prepare(message, output, model))
            except RefusedSentenceError as error:
                prepared.append(error)
        return LocalEmbed(thread, model, prepared, deadline, batch=batch, omit_tokens=request.options.omit_tokens)

    def get_model(self, request: pb.GetModelRequest, deadline: Deadline) -> pb.GetModelResponse:
        """Return what the model is."""
        _, model = self._model(deadline, request.expected_model_version)
        return description(model)

    def list_models(self, deadline: Deadline) -> pb.ListModelsResponse:
        """Return the one model."""
        _, model = self._model(deadline)
        return pb.ListModelsResponse(models=[description(model)])

    def check_health(self, service: str, deadline: Deadline) -> HealthStatus:
        """Return SERVING for the model, which is loaded for that, and for all of it; SERVICE_UNKNOWN for another."""
        _, model = self._model(deadline)
        return HealthStatus.SERVING if service in ("", MODEL_HEALTH + model.name) else HealthStatus.SERVICE_UNKNOWN

    def open_stream(self, opening: list[pb.EmbedStreamRequest], deliver: Deliver, deadline: Deadline) -> LocalStream:
        """Open a stream, which delivers results in the computing thread."""
        start, *items = opening
        thread, model = self._model(deadline, start.start.expected_model_version)
        stream = LocalStream(thread, model, start.start, deliver)
        for item in items:
            stream.send(item)
        return stream

    def wait(self, timeout_s: float) -> None:
        """Wait, or until the client is closed."""
        self._closed.wait(timeout_s)

    def close(self) -> None:
        """End all calls; the model's memory is free once nothing else holds it."""
        self._closed.set()
        with self._lock:
            ending, self._thread, self._ending = self._ending, None, None
        if ending is not None:
            ending()

    def begin_fork(self) -> None:
        """Start anew, in the child: the parent's thread and locks are not its own."""
        self._lock = threading.Lock()
        if self._thread is not None and self._thread.on_gpu:
            self._forked_on_gpu = True
        if self._ending is not None:
            self._ending.detach()
        self._thread = self._ending = None

    def _model(self, deadline: Deadline, expected: str = "") -> tuple[ComputingThread, LocalModel]:
        """Wait for the model, which is loaded if it isn't, and check its version.

        Raises:
            ModelError: It can't be loaded; the next call tries again.
            ModelVersionError: It is another one than expected.
        """
        thread = self._running()
        model = thread.model(deadline)
        if expected not in ("", model.version):
            raise ModelVersionError(
                f"the model's version is {model.version!r}, expected {expected!r}",
                code=grpc.StatusCode.FAILED_PRECONDITION,
                reason=Reason.MODEL_VERSION_MISMATCH.value,
            )
        return thread, model

    def _running(self) -> ComputingThread:
        with self._lock:
            self.check_open()
            if self._thread is None or self._thread.failed:
                load, chosen = self._load, self._chosen
                self._thread = ComputingThread(lambda: load(chosen))  # which must not keep this object alive
                self._ending = weakref.finalize(self, self._thread.close)  # at the end of the process, too
                self._thread.start()
            return self._thread


class LocalEmbed:
    """A `PendingEmbed`.

    Args:
        thread: Computes.
        model: That it computes with.
        prepared: The sentences, or what is wrong with them.
        deadline: Of the call.
        batch: Whether it steps aside for others.
        omit_tokens: Whether the client knows the tokens.
    """

    def __init__(
        self,
        thread: ComputingThread,
        model: LocalModel,
        prepared: Sequence[LocalSentence | RefusedSentenceError],
        deadline: Deadline,
        *,
        batch: bool,
        omit_tokens: bool,
    ) -> None:
        self._thread, self._model, self._prepared, self._deadline = thread, model, prepared, deadline
        self._omit_tokens = omit_tokens
        sentences = [each for each in prepared if not isinstance(each, RefusedSentenceError)]
        self._call = LocalCall(sentences, batch=batch)
        if sentences:
            thread.submit(self._call)
        else:
            self._call.done.set_result([])

    def result(self) -> pb.EmbedResponse:
        """Wait for the response; where the wait ends before, the call is cancelled."""
        try:
            computed = iter(self._call.done.result(self._deadline.remaining_s()))
        except TimeoutError:
            raise deadline_passed() from None
        finally:
            self.cancel()
        results: list[LocalResult] = [
            each if isinstance(each, RefusedSentenceError) else next(computed) for each in self._prepared
        ]
        return embed_response(self._model, results, omit_tokens=self._omit_tokens)

    def when_done(self, callback: Callable[[], object]) -> None:
        """Call back when `result` has no longer to wait."""
        self._call.done.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """Take the sentences out; does nothing once the call has ended."""
        self._thread.cancel(self._call)


_TRANSPORTS: "weakref.WeakSet[LocalTransport]" = weakref.WeakSet()


def _begin_forks() -> None:
    for transport in list(_TRANSPORTS):
        transport.begin_fork()


os.register_at_fork(after_in_child=_begin_forks)
