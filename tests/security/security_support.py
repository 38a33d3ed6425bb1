"""A real server over TCP, watched: its log, its answers, its descriptors, its memory."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_client.testing.server import START_TIMEOUT_S, STOP_TIMEOUT_S, wait_until_serving
from grpc_health.v1 import health_pb2, health_pb2_grpc

MIB = 2**20
EMBED_PATH, STREAM_PATH, MODEL_PATH = (f"/bilm_api.v1.EmbedService/{m}" for m in ("Embed", "EmbedStream", "GetModel"))
HEALTH_PATH = "/grpc.health.v1.Health/Check"
PLAIN = embed_pb2.EmbedOptions(
    layers=embed_pb2.LAYERS_ALL, pooling=embed_pb2.POOLING_NONE, data_type=embed_pb2.DATA_TYPE_FLOAT32
)

# Ours and Python's, and what the C core writes before it ends the process
_BAD_LINE = re.compile(r" (ERROR|CRITICAL) |^Traceback|^F\d{4} ")
# The C core writes such a line for a header that it can't read, past Python's logging
_CORE_LINE = re.compile(r"^[EWI]\d{4} ")
_LISTENING = re.compile(r"listening on (\S+):(\d+)")
_CHECK_TIMEOUT_S = 20.0
# Connections end a moment after their clients have seen the end
_SETTLE_S = 60.0
# A call with a path that isn't UTF-8 has the server listen anew (bilm_server.acceptor), which takes some milliseconds;
# what comes in between is refused, reset or cancelled
LISTENS_ANEW_S = 30.0
_LISTENING_ANEW = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
_LOOK_INTERVAL_S = 0.02


class TcpServer:
    """A `bilm-serve` process on a free loopback port, as a context manager.

    Attributes:
        bad_lines: what it logged as an error, or wrote as a traceback.
        core_lines: how many lines gRPC's C core has written.
    """

    def __init__(
        self,
        *flags: str,
        program: tuple[str, ...] = ("-m", "bilm_server"),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.bad_lines: list[str] = []
        self.core_lines = 0
        self._command = [sys.executable, *program, "--model", "random:tiny", "--listen", "127.0.0.1:0"]
        self._command += ["--drain-delay-s", "0", *flags]
        self._environment = {**os.environ, **environment}
        self._address: tuple[str, int] | None = None
        self._told = threading.Event()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = threading.Thread(target=self._read_log)

    def __enter__(self) -> "TcpServer":
        self._folder = tempfile.TemporaryDirectory(prefix="bilm-security-")
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader.start()
        try:
            if not self._told.wait(START_TIMEOUT_S) or self._address is None:
                raise RuntimeError(f"the server doesn't listen:\n{self.log()}")
            wait_until_serving(self.target, self._process, START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> tuple[str, int]:
        assert self._address is not None, "it has not started"
        return self._address

    @property
    def target(self) -> str:
        return "{}:{}".format(*self.address)

    @property
    def process_id(self) -> int:
        assert self._process is not None, "it has not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """All that it has written; whole once it has stopped."""
        assert self._folder is not None, "it has not started"
        return (Path(self._folder.name) / "log").read_text(encoding="utf-8", errors="replace")

    def stop(self) -> str:
        """Stops it by SIGTERM; returns its log. Nothing happens the second time."""
        assert self._process is not None
        assert self._folder is not None
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._reader.join()
            written = self.log() if Path(self._folder.name).exists() else ""
            self._folder.cleanup()
        return written

    def _read_log(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._folder is not None
        with self._process.stdout as lines, (Path(self._folder.name) / "log").open("wb") as log:
            for line in lines:
                log.write(line)
                log.flush()
                text = line.decode(errors="replace").rstrip()
                if self._address is None and (match := _LISTENING.search(text)):
                    self._address = match[1], int(match[2])
                    self._told.set()
                self.core_lines += _CORE_LINE.match(text) is not None
                if _BAD_LINE.search(text):
                    self.bad_lines.append(text)
        self._told.set()  # if it ended before it listened


def resident_bytes(process_id: int) -> int:
    for line in Path(f"/proc/{process_id}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc has no VmRSS")


def descriptors(process_id: int) -> int:
    return len(list(Path(f"/proc/{process_id}/fd").iterdir()))


class Watch:
    """Sees whether a server is still what it was at the beginning.

    Attributes:
        first_bytes: its resident memory at the beginning.
        first_descriptors: its descriptors.
    """

    def __init__(self, server: TcpServer) -> None:
        self._server = server
        self._expected = self._answer()
        self._bad_lines = 0
        self.first_bytes = resident_bytes(server.process_id)
        self.first_descriptors = descriptors(server.process_id)

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
        while (found := descriptors(self._server.process_id)) > self.first_descriptors and time.monotonic() < end_s:
            time.sleep(_LOOK_INTERVAL_S)  # the kernel has no event for another process's descriptors
        return found

    def _answer(self) -> list[bytes]:
        end_s = time.monotonic() + LISTENS_ANEW_S
        while True:
            try:
                return self._one_answer()
            except grpc.RpcError as error:
                if error.code() not in _LISTENING_ANEW or time.monotonic() > end_s:
                    raise
            time.sleep(_LOOK_INTERVAL_S)

    def _one_answer(self) -> list[bytes]:
        """The results of the known sentences, on a connection of their own, after a look at health."""
        with grpc.insecure_channel(self._server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            options: dict[str, Any] = {"timeout": _CHECK_TIMEOUT_S}
            status = health.Check(health_pb2.HealthCheckRequest(), **options).status
            request = embed_pb2.EmbedRequest(options=PLAIN, sentences=known_sentences())
            response = embed_pb2_grpc.EmbedServiceStub(channel).Embed(request, **options)
            return [b"health %d" % status, *(result.SerializeToString() for result in response.results)]


def known_sentences() -> list[embed_pb2.Sentence]:
    words = ["The", "play", "was", "a", "success", "."]
    sentence = embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=words), return_state=True)
    return [sentence, embed_pb2.Sentence(text="Straße, 日本 — and “text”."), embed_pb2.Sentence(text="")]
