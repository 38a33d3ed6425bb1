"""A bare grpc.aio handler: bytes in, the same bytes out each time. What any service in Python costs at least.

`BareServer` starts it in a process of its own; a load generator calls it as it calls bilm-serve.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import grpc
from bilm_client.testing.server import RunningServer

from benchmarks.paths import ROOT

_READY_S = 30.0
_STOP_S = 10.0


class BareServer:
    """A bare handler's process, as a context manager that gives a `RunningServer`.

    Args:
        response: sent for every call, whatever its method.
    """

    def __init__(self, response: bytes) -> None:
        self._response = response
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunningServer:
        self._folder = tempfile.TemporaryDirectory(prefix="bare-")
        path = Path(self._folder.name)
        (path / "response").write_bytes(self._response)
        target = f"unix:{path}/bare.sock"
        command = [sys.executable, "-m", "benchmarks.references.bare_server", target, str(path / "response")]
        self._process = subprocess.Popen(command, cwd=ROOT)
        try:
            with grpc.insecure_channel(target) as channel:
                grpc.channel_ready_future(channel).result(_READY_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return RunningServer(target, self._process.pid)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._folder is not None
        self._process.terminate()
        self._process.wait(_STOP_S)
        self._folder.cleanup()


class _AnyMethod(grpc.GenericRpcHandler):
    """Answers each unary call with the same bytes."""

    def __init__(self, response: bytes) -> None:
        self._handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._answer)
        self._response = response

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return self._handler

    async def _answer(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return self._response


async def _serve(target: str, response: bytes) -> None:
    server = grpc.aio.server(handlers=(_AnyMethod(response),))
    server.add_insecure_port(target)
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """Serve until a signal ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="unix:PATH to listen on")
    parser.add_argument("response", type=Path, help="file with the response's bytes")
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.target, arguments.response.read_bytes()))


if __name__ == "__main__":
    main()
