"""TLS for the server's port: certificate, key and, for mutual TLS, whose certificates callers must have."""

import codecs
import logging
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from bilm_server.security.reloading import ReloadedFiles, warn_if_open_to_others

_log = logging.getLogger(__name__)

# The public keys that gRPC's own TLS library signs with (1.85.1), as they begin in a certificate: it loads others and
# then fails every handshake, which after a rotation would shut out all new callers.
_USABLE_KEYS = (
    bytes.fromhex("300d06092a864886f70d0101010500"),  # RSA
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"),  # ECDSA, P-256
    bytes.fromhex("301006072a8648ce3d020106052b81040022"),  # ECDSA, P-384
)
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def server_credentials(certificate: Path, key: Path, client_ca: Path | None = None) -> grpc.ServerCredentials:
    """Return credentials for one port that follow the files.

    The files are looked at before each handshake. So a rotation holds for new connections, and those that are open go
    on until the maximum connection age. Certificate and key may be replaced one after the other: as long as they don't
    belong together, the pair before them stays in use.

    Args:
        certificate: the server's chain as PEM, its own certificate first; RSA, or ECDSA on P-256 or P-384.
        key: its private key as PEM, without a password.
        client_ca: certificates as PEM; callers need one that they have signed. None: callers need no certificate.

    Raises:
        ConfigurationError: a file can't be read, isn't what it should be, or the two don't belong together.
    """
    paths = (certificate, key) if client_ca is None else (certificate, key, client_ca)
    files = ReloadedFiles(paths, lambda contents: _configuration(paths, contents), _log)
    in_use = files.load()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Return what grpc uses from this handshake on, in its own thread; None: as before."""
        nonlocal in_use
        before, in_use = in_use, files.current()
        return None if in_use is before else in_use

    return grpc.dynamic_ssl_server_credentials(
        in_use,
        changed,  # type: ignore[arg-type] # the stubs know of no None
        require_client_authentication=client_ca is not None,
    )


def server_contexts(certificate: Path, key: Path, client_ca: Path | None = None) -> Callable[[], ssl.SSLContext]:
    """Return what makes the context of each handshake where Python's ssl is used; it follows the files, see above.

    Args:
        certificate: the server's chain.
        key: its private key.
        client_ca: whose certificates callers need; None: none.

    Raises:
        ConfigurationError: a file can't be read, isn't what it should be, or the two don't belong together.
    """
    paths = (certificate, key) if client_ca is None else (certificate, key, client_ca)
    files = ReloadedFiles(paths, lambda contents: _context(paths, contents), _log)
    files.load()
    return files.current


def _context(paths: Sequence[Path], contents: Sequence[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    certificate, key, *client_ca = paths
    _check(paths, contents)
    context.load_cert_chain(certificate, key, password=lambda: "")
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=contents[2].decode("ascii"))
    _check_unchanged(paths, contents)
    return context


def _configuration(paths: Sequence[Path], contents: Sequence[bytes]) -> grpc.ServerCertificateConfiguration:
    _check(paths, contents)
    _check_unchanged(paths, contents)
    client_ca = contents[2] if len(contents) > 2 else None
    return grpc.ssl_server_certificate_configuration([(contents[1], contents[0])], client_ca)


def _check(paths: Sequence[Path], contents: Sequence[bytes]) -> None:
    certificate, key, *client_ca = paths
    for path, content in zip(paths, contents, strict=True):
        # TLS libraries pass over a first line that begins so, and with it the first certificate
        if content.startswith(codecs.BOM_UTF8):
            raise ValueError(f"{path}: begins with a byte order mark, expected PEM without one")
    _check_pair(certificate, key)
    _check_key_type(certificate, contents[0])
    for path, content in zip(client_ca, contents[2:], strict=True):
        _check_ca(path, content)
    warn_if_open_to_others(key, _log)


def _check_unchanged(paths: Sequence[Path], contents: Sequence[bytes]) -> None:
    """Refuse files that changed meanwhile: Python's ssl reads a pair from the files alone."""
    if [path.read_bytes() for path in paths] != list(contents):
        raise ValueError(f"{paths[0]}: changed while it was read")


def _check_pair(certificate: Path, key: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # without it, OpenSSL would ask the terminal
    except ssl.SSLError as error:
        raise ValueError(
            f"{certificate}, {key}: not a certificate chain and the key that belongs to it, without a password, as PEM "
            f"({error.reason or 'unreadable'})"
        ) from error


def _check_key_type(path: Path, content: bytes) -> None:
    own = _CERTIFICATE.search(content.decode("ascii", "replace"))
    if own is None or not any(start in ssl.PEM_cert_to_DER_cert(own[0]) for start in _USABLE_KEYS):
        raise ValueError(f"{path}: the certificate's key must be RSA, or ECDSA on P-256 or P-384")


def _check_ca(path: Path, content: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{path}: no certificates as PEM") from error
