"""`bilm-health`: asks a server how it is. For container health checks and for people.

Imports no numpy: a probe starts it every few seconds.
"""

import argparse
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import grpc
from bilm_api.constants import MODEL_HEALTH
from bilm_system.terminal import is_lost, run_command
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bilm_client._transport.channels import new_channel
from bilm_client.cli.connection_flags import add_connection_flags, add_timeout_flag, read_credentials
from bilm_client.cli.credentials import CredentialsError

SERVING, NOT_SERVING, UNREACHABLE = 0, 1, 2
_RECONNECT_PAUSE_S = 1.0
_Status = health_pb2.HealthCheckResponse.ServingStatus
_Metadata = tuple[tuple[str, str], ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        The exit code: 0 SERVING, 1 not serving or an unknown service, 2 unreachable, too slow, or a file can't be
        used; 141 if it is SERVING and nobody reads it.

    Raises:
        SystemExit: with 2, for bad arguments.
    """
    return run_command("bilm-health", partial(_main, argv), failed=UNREACHABLE)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        credentials, token = read_credentials(args)
    except CredentialsError as error:
        print(f"bilm-health: {error}", file=sys.stderr)
        return UNREACHABLE
    metadata: _Metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    service = MODEL_HEALTH + args.model if args.model else args.service
    with new_channel(args.target, credentials=credentials, proxy=not args.no_proxy) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        if args.watch:
            return _watch(partial(stub.Watch, request, metadata=metadata))
        return _check(partial(stub.Check, request, metadata=metadata, timeout=args.timeout_s))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilm-health",
        description="Ask a bilm-serve server for its health. Exit code: 0 serving, 1 not serving, 2 unreachable.",
    )
    add_connection_flags(parser, target="the server", token="bearer token; bilm-serve itself wants none")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--service", default="", metavar="NAME", help="a service of it; default: the whole server")
    names.add_argument(
        "--model", type=_model, metavar="NAME", help=f"one of its models; as --service {MODEL_HEALTH}NAME"
    )
    parser.add_argument("--watch", action="store_true", help="print each change until interrupted")
    add_timeout_flag(parser, 1.0, "longest wait of a check in seconds")
    return parser


def _model(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be a name, got an empty one")
    return text


def _check(check: Callable[[], health_pb2.HealthCheckResponse]) -> int:
    try:
        response = check()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            print("SERVICE_UNKNOWN")
            return NOT_SERVING
        print(f"UNREACHABLE {error.code().name}: {error.details()}", file=sys.stderr)
        return UNREACHABLE
    print(_Status.Name(response.status))
    return _exit_code(response.status)


def _watch(watch: Callable[..., Iterator[health_pb2.HealthCheckResponse]]) -> int:
    last = UNREACHABLE
    connected = True  # a loss is reported once, however often the connection is tried again
    pause = threading.Event()
    try:
        while True:
            try:
                for response in watch(wait_for_ready=not connected):
                    connected, last = True, _exit_code(response.status)
                    _print_line(_Status.Name(response.status))
                    if is_lost():
                        return last
            except grpc.RpcError as error:
                last = UNREACHABLE
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    _print_line(f"UNREACHABLE {error.code().name}")
                    return last
                if connected:
                    _print_line(f"UNREACHABLE {error.code().name}")
                connected = False
            if is_lost():
                return last
            pause.wait(_RECONNECT_PAUSE_S)
    except KeyboardInterrupt:
        return last


def _exit_code(status: int) -> int:
    return SERVING if status == health_pb2.HealthCheckResponse.SERVING else NOT_SERVING


def _print_line(text: str) -> None:
    print(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
