"""What a server answers while its model loads: health at once, and calls that they should come again."""

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_client import AsyncClient, Client
from bilm_client.errors import UnavailableError
from bilm_client.policy import RetryPolicy
from bilm_client.results import HealthStatus
from bilm_server.app import build_server
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.lifecycle import Server
from bilm_server.preflight import plan_serving
from bilm_server.served_model import ServedModel, load_served_model
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.integration_support import PLAIN, tokens
from tests.support.processes import free_port
from tests.support.server_processes import ProcessServer
from tests.support.servers import with_defaults

ONCE = RetryPolicy(max_attempts=1)
REQUEST = embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens("w")])
START = embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=PLAIN))


class LoadingServer:
    """A server whose model loads until it may be there."""

    def __init__(self) -> None:
        self.ready_port, self.metrics_port = free_port(), free_port()
        flags = ("--ready-listen", f"127.0.0.1:{self.ready_port}", "--metrics-listen", f"127.0.0.1:{self.metrics_port}")
        config = load_config(with_defaults(flags))
        self._model = load_served_model(config)
        self.may_load = threading.Event()
        self.server: Server = build_server(config, plan_serving(config), self._load)

    def _load(self, _: ServerConfig) -> ServedModel:
        assert self.may_load.wait(60)
        return self._model


@pytest.fixture
async def loading() -> AsyncIterator[LoadingServer]:
    loading = LoadingServer()
    await loading.server.start()
    task = asyncio.create_task(loading.server.load())
    try:
        yield loading
    finally:
        loading.may_load.set()
        await task
        await loading.server.stop()


async def test_health_is_answered_and_calls_are_sent_back(loading: LoadingServer) -> None:
    async with AsyncClient(loading.server.target, retry=ONCE) as client:
        for name, status in (("", "NOT_SERVING"), ("inference", "NOT_SERVING"), ("liveness", "SERVING")):
            assert await client.health(name) is HealthStatus[status]
    async with grpc.aio.insecure_channel(loading.server.target) as channel:
        stub: Any = embed_pb2_grpc.EmbedServiceStub(channel)
        for call in (
            stub.Embed(REQUEST),
            stub.GetModel(embed_pb2.GetModelRequest()),
            stub.EmbedStream(iter([START])).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            metadata: Any = dict(error.value.trailing_metadata())
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert b"MODEL_LOADING" in metadata["grpc-status-details-bin"]
            assert metadata["grpc-retry-pushback-ms"] == "1000"
        loading.may_load.set()
        await _serves(loading.server)
        response = await stub.Embed(REQUEST)
        assert response.results[0].HasField("embedding")


async def _serves(server: Server) -> None:
    """Wait until a server is SERVING."""
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods
        async for response in stub.Watch(health_pb2.HealthCheckRequest(), timeout=60):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


class _LoadsAtARefusal(logging.Handler):
    """Lets a model be there when a first call has been refused: its access line says so."""

    def __init__(self, may_load: threading.Event) -> None:
        super().__init__()
        self._may_load = may_load

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().endswith(" UNAVAILABLE"):
            self._may_load.set()


@pytest.mark.parametrize("by", ["call", "stream"])
async def test_a_client_tries_again_until_the_model_is_there(
    loading: LoadingServer, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    caplog.set_level("INFO")
    access, loads = logging.getLogger("bilm_server.observability.access_log"), _LoadsAtARefusal(loading.may_load)
    access.addHandler(loads)
    try:
        async with AsyncClient(loading.server.target) as client:
            if by == "call":
                (embedding,) = await client.embed([["a", "b"]])
            else:
                (embedding,) = [found async for found in client.embed_stream([["a", "b"]])]
    finally:
        access.removeHandler(loads)
    assert embedding.tokens == ("a", "b")
    assert loading.may_load.is_set()


async def test_what_a_client_raises_that_does_not_try_again(loading: LoadingServer) -> None:
    async with AsyncClient(loading.server.target, retry=ONCE) as client:
        with pytest.raises(UnavailableError) as error:
            await client.embed([["a"]])
    assert (error.value.reason, error.value.pushback_ms) == ("MODEL_LOADING", 1000)


async def test_the_readiness_port_is_closed_and_metrics_are_there(loading: LoadingServer) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", loading.ready_port), 20)
    text = await asyncio.to_thread(_metrics, loading.metrics_port)
    assert b"bilm_health_serving 0.0" in text
    assert b'bilm_admitted_tokens_limit{room="unary"} 65536.0' in text
    assert b"bilm_model_info{" not in text
    loading.may_load.set()
    await _serves(loading.server)
    assert b"bilm_model_info{" in await asyncio.to_thread(_metrics, loading.metrics_port)


def _metrics(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
        return bytes(response.read())


# ---- the process ----


@pytest.mark.parametrize("flags", [[], ["--http-listen", "127.0.0.1:0"]])
def test_nothing_that_takes_long_is_imported_before_the_port_is_open(flags: list[str]) -> None:
    code = (
        "import sys; from bilm_server.main import build_server, plan_serving, load_config; "
        f"config = load_config({flags!r}); "
        "build_server(config, plan_serving(config), None); "
        "print([m for m in ('torch', 'numpy', 'numba', 'llvmlite', 'h5py', 'sacremoses') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_sacremoses_is_loaded_when_the_server_serves_or_with_the_first_text() -> None:
    code = (
        "import sys; from bilm_server.config_sources import load_config; "
        "from bilm_server.served_model import load_served_model; "
        "model = load_served_model(load_config(['--model', 'random:tiny'])); before = 'sacremoses' in sys.modules; "
        "print(before, model.tokenizer.name.partition(' ')[0], model.tokenizer('Hello, you.').tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False moses-en ('Hello', ',', 'you', '.')"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_whose_model_never_loads(number: signal.Signals) -> None:
    server = ProcessServer(module="tests.support.loading_server")
    server.launch()
    try:
        server.wait_until_listening()
        with Client(server.target) as client:
            assert client.health("liveness") is HealthStatus.SERVING
        server.send_signal(number)
        assert server.wait() == 0
        assert "stopped" in server.text()
    finally:
        server.kill()


def test_a_model_that_cannot_be_loaded_ends_the_process_with_1() -> None:
    server = ProcessServer("--device", "cuda:99")
    server.launch()
    try:
        assert server.wait() == 1
        assert "listening on" in server.text()
        assert server.lines[-1].startswith("bilm-serve: device cuda:99: this machine has ")
    finally:
        server.kill()


def test_a_bad_model_ends_the_process_before_the_port_opens(tmp_path: Any) -> None:
    server = ProcessServer("--model", str(tmp_path / "none"))
    server.launch()
    try:
        assert server.wait() == 1
        assert "listening on" not in server.text()
        assert server.lines[-1] == f"bilm-serve: {tmp_path / 'none'}: no such file or folder\n"
    finally:
        server.kill()


def test_kernels_that_are_required_and_missing_end_the_process() -> None:
    code = """
import sys
from bilm_model.kernels.fallbacks import note_fallback
from bilm_server.main import main
note_fallback("a part", "fused kernels unavailable, simulated", RuntimeError("no compiler"))
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "--model", "random:tiny", "--listen", "127.0.0.1:0", "--require-kernels"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "fused kernels unavailable, simulated: no compiler" in run.stderr
    assert "require_kernels: a part: kernels don't work here" in run.stderr
