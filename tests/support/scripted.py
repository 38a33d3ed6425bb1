"""A server in this process, on port 0, that plays a script; fixtures for its tests."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from bilm_api.constants import PUSHBACK_KEY
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from bilm_client.errors import error_status
from bilm_client.testing.models import FakeModel
from bilm_client.testing.service import CallFailure, FakeService, FakeStream
from grpc_health.v1 import health, health_pb2_grpc

EmbedAct = Callable[[pb.EmbedRequest, Any], pb.EmbedResponse]
StreamAct = Callable[[Iterator[pb.EmbedStreamRequest], Any], Iterator[pb.EmbedStreamResponse]]


def abort(context: Any, code: grpc.StatusCode, reason: str = "", pushback_ms: int | None = None) -> None:
    """End a call as the server does: status, ErrorInfo, pushback."""
    metadata: list[tuple[str, str | bytes]] = []
    if reason:
        status = error_status(reason, "as scripted", code.value[0])
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    if pushback_ms is not None:
        metadata.append((PUSHBACK_KEY, str(pushback_ms)))
    context.set_trailing_metadata(tuple(metadata))
    context.abort(code, "as scripted")


@contextmanager
def refusing(context: Any) -> Iterator[None]:
    """End a call as the fake service says."""
    try:
        yield
    except CallFailure as failure:
        context.set_trailing_metadata(failure.trailing_metadata())
        context.abort(failure.code(), failure.details())


def failing(code: grpc.StatusCode, reason: str = "", pushback_ms: int | None = None) -> EmbedAct:
    """A unary act that aborts."""

    def act(_request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        abort(context, code, reason, pushback_ms)
        raise AssertionError

    return act


class ScriptedService(embed_pb2_grpc.EmbedServiceServicer):
    """Plays the acts it was given, then answers as the fake service does; keeps what it was asked."""

    def __init__(self) -> None:
        self.fake = FakeService()
        self.model = self.fake.get_model()
        self.embed_acts: deque[EmbedAct] = deque()
        self.stream_acts: deque[StreamAct] = deque()
        self.embed_requests: list[pb.EmbedRequest] = []
        self.streams: list[list[pb.EmbedStreamRequest]] = []
        self.get_model_count = 0
        self.answered = threading.Semaphore(0)
        self.metadata: dict[str, str | bytes] = {}

    def serve(self, *models: FakeModel) -> None:
        """Serve these from now on, the default one first."""
        self.fake = FakeService(models)
        self.model = self.fake.get_model()

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        self.get_model_count += 1
        with refusing(context):
            named = self.fake.get_model(request)
        return self.model if named.name == self.model.name else named

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        return self.fake.list_models()

    def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        self.embed_requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        with refusing(context):
            response = self.embed_acts.popleft()(request, context) if self.embed_acts else self.fake.embed(request)
        self.answered.release()
        return response

    def EmbedStream(  # noqa: N802
        self, request_iterator: Iterator[pb.EmbedStreamRequest], context: Any
    ) -> Iterator[pb.EmbedStreamResponse]:
        received: list[pb.EmbedStreamRequest] = []
        self.streams.append(received)

        def requests() -> Iterator[pb.EmbedStreamRequest]:
            for request in request_iterator:
                received.append(request)
                yield request

        act = self.stream_acts.popleft() if self.stream_acts else self.answer
        yield from act(requests(), context)

    def answer(self, requests: Iterator[pb.EmbedStreamRequest], context: Any) -> Iterator[pb.EmbedStreamResponse]:
        """Answer every item in order."""
        with refusing(context):
            stream = FakeStream(self.fake, next(requests).start)
        for request in requests:
            yield stream.answer(request.item)

    def answer_then_fail(
        self, count: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, pushback_ms: int | None = None
    ) -> StreamAct:
        """A stream act that answers `count` items, reads one more, and aborts."""

        def act(requests: Iterator[pb.EmbedStreamRequest], context: Any) -> Iterator[pb.EmbedStreamResponse]:
            stream = FakeStream(self.fake, next(requests).start)
            for _, request in zip(range(count), requests, strict=False):
                yield stream.answer(request.item)
            next(requests, None)
            abort(context, code, pushback_ms=pushback_ms)

        return act

    def stream_ids(self, number: int) -> list[int]:
        """The items that a stream has received."""
        return [request.item.id for request in self.streams[number] if request.HasField("item")]


class ScriptedAdmin(embed_pb2_grpc.AdminServiceServicer):
    """Answers each Reload as the next of its acts does; without one as a server that doesn't know its callers."""

    def __init__(self) -> None:
        self.acts: deque[Callable[[Any], pb.ReloadResponse]] = deque()
        self.metadata: dict[str, str | bytes] = {}

    def Reload(self, request: pb.ReloadRequest, context: Any) -> pb.ReloadResponse:  # noqa: N802
        self.metadata = dict(context.invocation_metadata())
        if not self.acts:
            abort(context, grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_FOUND")
        return self.acts.popleft()(context)


@dataclass
class Hold:
    """A call that waits."""

    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Scripted:
    """The running server."""

    target: str
    service: ScriptedService
    admin: ScriptedAdmin
    health_servicer: health.HealthServicer = field(repr=False)

    def set_health(self, status: Any, name: str = "") -> None:
        self.health_servicer.set(name, status)

    def fail_next(
        self, code: grpc.StatusCode, reason: str = "", pushback_ms: int | None = None, times: int = 1
    ) -> None:
        """Let the next calls of Embed fail."""
        self.service.embed_acts.extend([failing(code, reason, pushback_ms)] * times)

    def answer_next(self, version: str = "fake-1") -> None:
        """Let the next call of Embed be answered, by a model of that version."""

        def act(request: pb.EmbedRequest, _context: Any) -> pb.EmbedResponse:
            response = self.service.fake.embed(request)
            response.usage.model_version = version
            return response

        self.service.embed_acts.append(act)

    def hold_next(self) -> Hold:
        """Let the next call of Embed wait for its release."""
        hold = Hold()

        def act(request: pb.EmbedRequest, _context: Any) -> pb.EmbedResponse:
            hold.arrived.set()
            hold.released.wait(60)
            return self.service.fake.embed(request)

        self.service.embed_acts.append(act)
        return hold


@contextmanager
def running_scripted() -> Iterator[Scripted]:
    server = grpc.server(
        ThreadPoolExecutor(64, thread_name_prefix="scripted"),
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 4 * 1024 * 1024)],
    )
    service, admin, health_servicer = ScriptedService(), ScriptedAdmin(), health.HealthServicer()
    embed_pb2_grpc.add_EmbedServiceServicer_to_server(service, server)
    embed_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Scripted(f"127.0.0.1:{port}", service, admin, health_servicer)
    finally:
        server.stop(None).wait()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with running_scripted() as one:
        yield one


@pytest.fixture(scope="module")
def answering() -> Iterator[Scripted]:
    """One server for all tests of a file, which leave its script alone."""
    with running_scripted() as one:
        yield one
