"""A real server over TCP, watched: its log, its answers, its descriptors, its memory."""

import re
import time
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import descriptors, resident_bytes
from tests.support.server_processes import ProcessServer

EMBED_PATH, STREAM_PATH, MODEL_PATH, MODELS_PATH = (
    f"/bilm_api.v1.EmbedService/{method}" for method in ("Embed", "EmbedStream", "GetModel", "ListModels")
)
RELOAD_PATH = "/bilm_api.v1.AdminService/Reload"
HEALTH_PATH = "/grpc.health.v1.Health/Check"
INFER_PATH, READY_PATH = (f"/inference.GRPCInferenceService/{m}" for m in ("ModelInfer", "ModelReady"))
PLAIN = embed_pb2.EmbedOptions(
    layers=embed_pb2.LAYERS_ALL, pooling=embed_pb2.POOLING_NONE, data_type=embed_pb2.DATA_TYPE_FLOAT32
)

# Ours and Python's, and what the C core writes before it ends the process
_BAD_LINE = re.compile(r" (ERROR|CRITICAL) |^Traceback|^F\d{4} ")
# The C core writes such a line for a header that it can't read, past Python's logging
_CORE_LINE = re.compile(r"^[EWI]\d{4} ")
_CHECK_TIMEOUT_S = 20.0
# A connection that the server accepts and closes while it listens anew leaves gRPC's client waiting, once in some
# hundred times beside other load: the call never reaches the server. Another connection is tried then
_FIRST_CALL_TIMEOUT_S = 8.0
# Connections end a moment after their clients have seen the end
_SETTLE_S = 60.0
# A call with a path that isn't UTF-8 has the server listen anew (protocols.grpc.acceptor), which takes milliseconds;
# what comes in between is refused, reset or cancelled
LISTENS_ANEW_S = 30.0
_LISTENING_ANEW = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
_LOOK_INTERVAL_S = 0.02


class WatchedServer(ProcessServer):
    """A server whose log is looked at."""

    def __init__(self, *flags: str, **options: Any) -> None:
        super().__init__(*flags, **options)
        self._bad_lines: list[str] = []
        self._core_lines = 0
        self._seen = 0

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.target.rpartition(":")
        return host, int(port)

    @property
    def bad_lines(self) -> list[str]:
        """What it has logged as an error, or written as a traceback."""
        self._look()
        return self._bad_lines

    @property
    def core_lines(self) -> int:
        """How many lines gRPC's C core has written."""
        self._look()
        return self._core_lines

    def stop(self) -> str:
        """Stop it by SIGTERM; return its log."""
        self.terminate()
        return self.text()

    def _look(self) -> None:
        for line in self.lines[self._seen :]:
            self._seen += 1
            self._core_lines += _CORE_LINE.match(line) is not None
            if _BAD_LINE.search(line):
                self._bad_lines.append(line.rstrip())


class Watch:
    """Sees whether a server is still what it was at the beginning.

    Attributes:
        first_bytes: its resident memory at the beginning.
        first_descriptors: its descriptors.
    """

    def __init__(self, server: WatchedServer) -> None:
        self._server = server
        self._expected = self._answer()
        self._bad_lines = 0
        self.first_bytes = resident_bytes(server.pid)
        self.first_descriptors = descriptors(server.pid)

    def complaints(self) -> list[str]:
        """What is wrong now: not alive, not SERVING, other bits, errors in its log since the last time."""
        if not self._server.alive:
            return ["the server is dead"]
        found = [f"in the log: {line}" for line in self._server.bad_lines[self._bad_lines :]]
        self._bad_lines += len(found)
        try:
            if self._answer() != self._expected:
                found.append("the known sentences have other bits")
        except grpc.RpcError as error:
            found.append(f"the known sentences get no answer: {error}")
        return found

    def settled_descriptors(self) -> int:
        """Descriptors now that every connection has been closed; waits a while for that."""
        end_s = time.monotonic() + _SETTLE_S
        while (found := descriptors(self._server.pid)) > self.first_descriptors and time.monotonic() < end_s:
            time.sleep(_LOOK_INTERVAL_S)  # the kernel has no event for another process's descriptors
        return found

    def _answer(self) -> list[bytes]:
        end_s = time.monotonic() + LISTENS_ANEW_S
        while True:
            with grpc.insecure_channel(self._server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                passing = _LISTENING_ANEW | {grpc.StatusCode.DEADLINE_EXCEEDED}
                try:
                    health = _health(channel)
                    passing = _LISTENING_ANEW
                    return [b"health %d" % health, *_known_results(channel)]
                except grpc.RpcError as error:
                    if error.code() not in passing or time.monotonic() > end_s:
                        raise
            time.sleep(_LOOK_INTERVAL_S)


def _health(channel: grpc.Channel) -> int:
    """Health, by the first call of a connection."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(), timeout=_FIRST_CALL_TIMEOUT_S).status
    return status


def _known_results(channel: grpc.Channel) -> list[bytes]:
    """The results of the known sentences."""
    request = embed_pb2.EmbedRequest(options=PLAIN, sentences=known_sentences())
    response = embed_pb2_grpc.EmbedServiceStub(channel).Embed(request, timeout=_CHECK_TIMEOUT_S)
    return [result.SerializeToString() for result in response.results]


def known_sentences() -> list[embed_pb2.Sentence]:
    words = ["The", "play", "was", "a", "success", "."]
    sentence = embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=words), return_state=True)
    return [sentence, embed_pb2.Sentence(text="Straße, 日本 — and “text”."), embed_pb2.Sentence(text="")]
