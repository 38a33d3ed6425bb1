"""Flags of the small commands that say how a server is reached; imports no numpy."""

import argparse
import os
from pathlib import Path

import grpc

from bilm_client.cli.credentials import channel_credentials, read_token


def add_connection_flags(parser: argparse.ArgumentParser, *, target: str, token: str) -> None:
    """Add the flags.

    Args:
        parser: Where to.
        target: What the target is.
        token: What the bearer token is.
    """
    default = os.environ.get("BILM_TARGET", "127.0.0.1:50051")
    parser.add_argument("--target", default=default, metavar="HOST:PORT", help=f"{target} (BILM_TARGET; %(default)s)")
    parser.add_argument("--tls", action="store_true", help="connect by TLS")
    parser.add_argument("--ca-file", type=Path, metavar="PEM", help="certificates to trust; implies --tls")
    parser.add_argument("--cert-file", type=Path, metavar="PEM", help="own certificate, for mutual TLS; implies --tls")
    parser.add_argument("--key-file", type=Path, metavar="PEM", help="its key")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=token)
    parser.add_argument("--no-proxy", action="store_true", help="use no proxy, whatever http_proxy and the like say")


def add_timeout_flag(parser: argparse.ArgumentParser, default_s: float, help_text: str) -> None:
    """Add --timeout-s."""
    parser.add_argument("--timeout-s", type=_seconds, default=default_s, help=f"{help_text} (%(default)s)")


def read_credentials(args: argparse.Namespace) -> tuple[grpc.ChannelCredentials | None, str | None]:
    """Return credentials (None: plaintext) and token (None: none) from the files that the flags name.

    Raises:
        CredentialsError: A file can't be used.
    """
    token = read_token(args.token_file)
    credentials = channel_credentials(
        tls=args.tls, ca_file=args.ca_file, cert_file=args.cert_file, key_file=args.key_file
    )
    return credentials, token


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value
