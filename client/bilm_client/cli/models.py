"""`bilm-models`: which models a server serves, and the order to read its configuration again. For operators."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import grpc
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from bilm_system.terminal import run_command

from bilm_client._core.balancing import as_target, each_target
from bilm_client._core.settings import Settings
from bilm_client._transport.channels import sync_channel
from bilm_client._transport.grpc_sync import GrpcSyncTransport
from bilm_client.cli.connection_flags import add_connection_flags, add_timeout_flag, read_credentials
from bilm_client.cli.credentials import CredentialsError
from bilm_client.client import TransportClient
from bilm_client.errors import BilmError, ServiceError, service_error
from bilm_client.results import ModelInfo

DONE, REFUSED, UNUSABLE = 0, 1, 2

_HEADINGS = ("NAME", "VERSION", "LAYERS", "WIDTH", "PARAMS", "PRECISION", "TOKENIZER")
_NUMBERS = frozenset({"LAYERS", "WIDTH", "PARAMS"})
_NO_LIST = "its version is earlier than this command's, and it serves one model, which Client.model_info() describes"
_NO_RELOAD = (
    "only a server that authenticates its callers (--token-file, --tls-client-ca) can be asked to reload; send SIGHUP "
    "to the process of any other"
)
_ADVICE_BY_REASON = {
    Reason.RIGHT_MISSING: 'give this caller rights = ["reload"] in [[callers]] of the server\'s configuration',
    Reason.RELOAD_FAILED: "nothing has changed, the server serves what it served before",
    Reason.UNAUTHENTICATED: "name the file with this caller's token by --token-file",
}
_STILL_LOADING = "it may still be loading; bilm-models list shows what is served"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        The exit code: 0 done, 1 the server refused or can't be reached, or standard output can't be written, 2 a file
        or the target can't be used, 130 after Ctrl-C, 141 if nobody reads what is printed.

    Raises:
        SystemExit: with 2, for bad arguments.
    """
    return run_command("bilm-models", partial(_main, argv), failed=REFUSED)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace, Sequence[Settings]], None] = args.run
    try:
        settings = _settings(args)
    except (CredentialsError, ValueError) as error:
        return _fail(UNUSABLE, str(error))
    try:
        run(args, settings)
    except BilmError as error:
        return _fail(REFUSED, str(error))
    return DONE


def _settings(args: argparse.Namespace) -> list[Settings]:
    """Return how each server is reached, or, for one that is enough, all of them together."""
    credentials, token = read_credentials(args)
    target = as_target(args.target)
    return [
        Settings(target=each, credentials=credentials, token=token, timeout_s=args.timeout_s, proxy=not args.no_proxy)
        for each in (each_target(target) if args.each else [target])
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilm-models",
        description="List the models of a bilm-serve server, or have it read its configuration again. Exit code: 0 "
        "done, 1 refused or unreachable, 2 it can't be run as asked for.",
    )
    commands = parser.add_subparsers(required=True, metavar="list | reload")
    listing = commands.add_parser("list", help="print the models that are served", description="Print the models.")
    add_connection_flags(listing, target="the server", token="file with the bearer token")
    add_timeout_flag(listing, 10.0, "longest wait in seconds")
    listing.add_argument("--json", action="store_true", help="print everything that the server says, as JSON")
    listing.set_defaults(run=_list, each=False)
    reloading = commands.add_parser(
        "reload",
        help="have the models and callers of the configuration read again",
        description="Have a server read the models and callers of its configuration again, without a failed call. Of "
        "several servers (IP:PORT,IP:PORT,…), one after another, up to the first that refuses.",
    )
    add_connection_flags(reloading, target="the server or servers", token="file with the bearer token")
    add_timeout_flag(reloading, 600.0, "longest wait for a server in seconds, models being loaded meanwhile")
    reloading.set_defaults(run=_reload, each=True)
    return parser


# ---- list ----


def _list(args: argparse.Namespace, servers: Sequence[Settings]) -> None:
    with TransportClient(servers[0], GrpcSyncTransport) as client:
        try:
            models = client.list_models()
        except ServiceError as error:
            raise _advised(error, servers[0], {grpc.StatusCode.UNIMPLEMENTED: _NO_LIST}) from error
    if args.json:
        described = [{"default": number == 0, **dataclasses.asdict(model)} for number, model in enumerate(models)]
        print(json.dumps(described, indent=2))
    else:
        print("\n".join(table(models)))


def table(models: Sequence[ModelInfo]) -> Iterable[str]:
    """Yield the lines of a table of models, the default one marked; 80 columns where names have at most 14 letters."""
    rows = [_HEADINGS, *map(_cells, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        aligned = [
            cell.rjust(width) if heading in _NUMBERS else cell.ljust(width)
            for heading, cell, width in zip(_HEADINGS, row, widths, strict=True)
        ]
        yield f"{'*' if number == 1 else ' '} {'  '.join(aligned)}".rstrip()
        if number and (members := models[number - 1].members):
            yield f"    the vectors of {' + '.join(members)}"
    yield "* the default model"


def _cells(model: ModelInfo) -> tuple[str, ...]:
    return (
        model.name,
        model.version,
        str(model.layer_count),
        str(model.width),
        _rounded(model.parameter_count),
        model.precision,
        model.tokenizer.partition(" (")[0],
    )


def _rounded(count: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


# ---- reload ----


def _reload(_args: argparse.Namespace, servers: Sequence[Settings]) -> None:
    for server in servers:
        for line in _changes(_reload_one(server)):
            print(f"{server.target}: {line}" if len(servers) > 1 else line, flush=True)


def _reload_one(settings: Settings) -> pb.ReloadResponse:
    with sync_channel(settings) as channel:
        stub = embed_pb2_grpc.AdminServiceStub(channel)
        try:
            return stub.Reload(pb.ReloadRequest(), timeout=settings.timeout_s, metadata=settings.call_metadata())
        except grpc.RpcError as error:
            by_code = {
                grpc.StatusCode.UNIMPLEMENTED: _NO_RELOAD,
                grpc.StatusCode.DEADLINE_EXCEEDED: _STILL_LOADING,
            }
            raise _advised(service_error(error), settings, by_code) from error


def _changes(response: pb.ReloadResponse) -> Iterable[str]:
    for label in ("added", "replaced", "removed", "kept"):
        if names := getattr(response, label):
            yield f"{label}: {', '.join(names)}"


def _advised(error: ServiceError, settings: Settings, by_code: Mapping[grpc.StatusCode, str]) -> BilmError:
    """Return an error that says what was refused, and below it what to do."""
    by_reason = {reason.value: advice for reason, advice in _ADVICE_BY_REASON.items()}
    advice = by_reason.get(error.reason) or by_code.get(error.code)
    return BilmError("\n".join(filter(None, (f"{settings.target}: {error}", advice))))


def _fail(code: int, message: str) -> int:
    for line in message.splitlines():
        print(f"bilm-models: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
