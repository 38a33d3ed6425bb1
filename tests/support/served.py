"""The services on a fake engine behind a real gRPC server, on the test's own event loop."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from bilm_api.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_server.config import CallerSettings
from bilm_server.embedding.call_gate import CallGate
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.registry import Registry
from bilm_server.inference.types import Sentence
from bilm_server.observability.call_record import CallRecord
from bilm_server.protocols.embed_v1.service import EmbedService
from bilm_server.protocols.grpc.interceptors import CallInterceptor
from bilm_server.protocols.kserve.methods import MODEL_METHODS, handler_of
from bilm_server.protocols.kserve.service import InferenceService
from bilm_server.security.auth import Caller
from bilm_server.security.callers import CallerRights

from tests.support.embedders import NO_LIMITS, embedding
from tests.support.fake_engine import FakeEngine

SERVICE = "bilm_api.v1.EmbedService"


class EndedCalls:
    """Keeps the records of calls that have ended (`CallObserver`)."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []

    def begin(self, call: CallRecord) -> None:
        """See `CallObserver`."""

    def end(self, call: CallRecord) -> None:
        """See `CallObserver`."""
        self.records.append(call)


class Anybody:
    """Lets every client in, by its address."""

    def identify(self, metadata: Any, peer: str, auth_context: Any) -> Caller:
        """Return who calls."""
        return Caller("anybody")


@dataclass
class RunningService:
    """Services that run.

    Attributes:
        embedder: Behind it.
        stub: Of a client.
        kserve: Of a client of the Open Inference Protocol.
        ended: Calls that have ended.
    """

    embedder: Embedder
    stub: Any
    kserve: Any
    ended: EndedCalls = field(default_factory=EndedCalls)


@asynccontextmanager
async def serving(
    engine: FakeEngine[Sentence],
    *,
    stall_s: float = 60.0,
    options: tuple[tuple[str, int], ...] = (),
    callers: Sequence[CallerSettings] = (),
    **settings: Any,
) -> AsyncIterator[RunningService]:
    """Yield services on an engine.

    Args:
        engine: What computes.
        stall_s: Seconds that a stream's client may take to read a message.
        options: Of the client's channel.
        callers: With rights or ceilings; every client is "anybody".
        settings: Of `embedding`.
    """
    async with embedding(engine, **settings) as embedder:
        ended = EndedCalls()
        gate = CallGate(Anybody(), CallerRights(callers, authenticated=bool(callers)), NO_LIMITS, [ended])
        models = Registry(embedder.limits, embedder.conversions, [embedder])
        server = grpc.aio.server(interceptors=[CallInterceptor(SERVICE, gate)])
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(EmbedService(models, stall_s), server)
        server.add_generic_rpc_handlers((handler_of(InferenceService(models), MODEL_METHODS),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                stubs = embed_pb2_grpc.EmbedServiceStub(channel), GRPCInferenceServiceStub(channel)
                yield RunningService(embedder, *stubs, ended)
        finally:
            engine.go_on.set()
            await server.stop(0)


def text(content: str, **fields: Any) -> embed_pb2.Sentence:
    """Return a message with raw text."""
    return embed_pb2.Sentence(text=content, **fields)


def tokens(*words: str, **fields: Any) -> embed_pb2.Sentence:
    """Return a message with tokens."""
    return embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=words), **fields)
