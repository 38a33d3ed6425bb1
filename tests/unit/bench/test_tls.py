"""bilm-bench by TLS, to a server that asks for a certificate."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from bilm_bench.main import DONE, STOPPED, UNUSABLE, main
from bilm_client.testing.service import FakeService
from grpc_health.v1 import health, health_pb2_grpc

from tests.security.tls_support import Authority

LOAD = ("--rate", "40", "--step-s", "0.5", "--warm-up-s", "0", "--connections", "2", "--timeout-s", "5")


class _Service(embed_pb2_grpc.EmbedServiceServicer):
    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802 - the contract's
        return FakeService().get_model()

    def ListModels(  # noqa: N802 - likewise
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        raise AssertionError("the bench has one model")

    def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802 - likewise
        return FakeService().embed(request)

    def EmbedStream(  # noqa: N802 - likewise
        self, request_iterator: Iterator[pb.EmbedStreamRequest], context: Any
    ) -> Iterator[pb.EmbedStreamResponse]:
        raise AssertionError("the bench calls Embed only")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def target(authority: Authority) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    embed_pb2_grpc.add_EmbedServiceServicer_to_server(_Service(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    own = authority.issue("server")
    credentials = grpc.ssl_server_credentials([(own.key_pem, own.certificate_pem)], authority.pem, True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_mutual_tls_for_calls_and_health_checks(
    authority: Authority, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (text := tmp_path / "text").write_text("one sentence\n", encoding="utf-8")
    certificate, key = (str(path) for path in authority.issue("me").write(tmp_path, "me"))
    base = ["--target", target, "--text", str(text), *LOAD, "--ca-file", str(authority.write(tmp_path))]
    conditions = ["--fail-on", "failed>0,health.unanswered>0,health.checks<1,accepted.calls<1"]
    assert main([*base, "--cert-file", certificate, "--key-file", key, *conditions]) == DONE
    assert main(base) == STOPPED  # nobody without a certificate
    assert "bilm-bench: UNAVAILABLE" in capsys.readouterr().err
    assert main([*base, "--cert-file", key, "--key-file", key]) == UNUSABLE
    assert "Traceback" not in capsys.readouterr().err
