"""TLS credentials and the token of a command, from the files that its flags name; imports no numpy."""

import codecs
import ssl
from pathlib import Path

import grpc
from bilm_system.files import check_readable, read_bytes, reason, text_start


class CredentialsError(Exception):
    """A file with certificates, a key or a token can't be used; the message names it and nothing of its content."""


def channel_credentials(
    *, tls: bool = False, ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
) -> grpc.ChannelCredentials | None:
    """Return credentials of a channel; None: plaintext, where no argument is given.

    Args:
        tls: Connect by TLS; any of the files implies it.
        ca_file: Certificates to trust, as PEM; None: those that gRPC brings along.
        cert_file: The caller's own certificate chain, as PEM, for a server that wants one.
        key_file: Its private key, as PEM, without a password.

    Raises:
        CredentialsError: A file can't be used, or one of certificate and key is missing.
    """
    if not (tls or ca_file or cert_file or key_file):
        return None
    roots = None if ca_file is None else _roots(ca_file)
    if cert_file is None and key_file is None:
        return grpc.ssl_channel_credentials(roots)
    if cert_file is None or key_file is None:
        raise CredentialsError("a certificate and its key go together; one of the two files isn't named")
    chain, key = _read_pem(cert_file), _read_pem(key_file)
    _check_pair(cert_file, key_file)
    return grpc.ssl_channel_credentials(roots, key, chain)


def read_token(path: Path | None) -> str | None:
    """Return the bearer token that a file holds, with nothing but white space around it; None for no file.

    Raises:
        CredentialsError: The file can't be read, or holds something else.
    """
    if path is None:
        return None
    data = _read(path)
    try:
        words = data[text_start(data) :].decode("ascii", "replace").split()
    except ValueError as error:
        raise CredentialsError(f"{path}: {error}") from error
    if len(words) != 1 or not (words[0].isascii() and words[0].isprintable()):
        raise CredentialsError(f"{path}: expected one token of printable ASCII and nothing else")
    return words[0]


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:
        raise CredentialsError(f"{path}: {reason(error)}") from error


def _read_pem(path: Path) -> bytes:
    try:
        check_readable(path)  # of a pair, the TLS library opens the files itself: it would wait for a pipe
    except ValueError as error:
        raise CredentialsError(f"{path}: {error}") from error
    data = _read(path)
    # TLS libraries pass over a first line that begins so, and with it the first certificate
    if data.startswith(codecs.BOM_UTF8):
        raise CredentialsError(f"{path}: begins with a byte order mark, expected PEM without one")
    return data


def _roots(path: Path) -> bytes:
    roots = _read_pem(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=roots.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise CredentialsError(f"{path}: no certificates as PEM") from error
    return roots


def _check_pair(cert_file: Path, key_file: Path) -> None:
    try:
        # Without a password at hand, OpenSSL would ask the terminal for it
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert_file, key_file, password=lambda: "")
    except OSError as error:  # which ssl.SSLError is
        raise CredentialsError(
            f"{cert_file}, {key_file}: not a certificate chain and the key that belongs to it, without a password, as "
            "PEM"
        ) from error
