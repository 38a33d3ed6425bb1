"""Who calls: by bearer token, else by certificate, else by address."""

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from bilm_api.constants import Reason
from bilm_system.files import decode_text

from bilm_server.errors import RefusalError
from bilm_server.security.reloading import ReloadedFiles, warn_if_open_to_others

MIN_TOKEN_CHARACTERS = 16
"""Of a token; made of random characters, so many can't be guessed over a network."""

_log = logging.getLogger(__name__)

_SCHEME = "bearer"

Metadata = Iterable[tuple[str, str | bytes]]
AuthContext = Mapping[str, Iterable[bytes]]


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        name: for limits and the log; never a secret.
    """

    name: str


@dataclass(frozen=True)
class _Token:
    name: str
    digest: bytes = field(repr=False)


class Authenticator:
    """Names the caller of each call; used from the event loop only. Keeps digests of tokens, not the tokens."""

    def __init__(self, token_file: Path | None, *, equal: Callable[[bytes, bytes], bool] = hmac.compare_digest) -> None:
        """Keep the file's name; call `load` to read it.

        Args:
            token_file: one token a line, as `NAME TOKEN`; empty lines and lines that begin with # are passed over.
                Several lines may have one name, so that a token can be replaced while both hold. None: no token is
                needed.
            equal: compares digests, in a time that doesn't depend on where they differ.
        """
        self._equal = equal
        self._tokens: ReloadedFiles[Sequence[_Token]] | None = None
        if token_file is not None:
            self._tokens = ReloadedFiles([token_file], lambda contents: _read_tokens(token_file, contents[0]), _log)

    def load(self) -> None:
        """Read the tokens; from then on, a change of the file holds for the next call.

        Raises:
            ConfigurationError: the file can't be read, has a line that isn't as it should be, or has no token.
        """
        if self._tokens is not None:
            self._tokens.load()

    def identify(self, metadata: Metadata, peer: str, auth_context: AuthContext) -> Caller:
        """Return who calls.

        Args:
            metadata: the caller's.
            peer: as grpc names it.
            auth_context: what grpc knows of the connection.

        Returns:
            The name of the token; where none are needed the name in the caller's certificate (its common name, else
            its first alternative one); without a certificate the caller's address.

        Raises:
            RefusalError: UNAUTHENTICATED, if a token is needed and none is given that is known.
        """
        if self._tokens is None:
            return Caller(_certificate_name(auth_context) or _address(peer))
        return Caller(self._owner(_bearer(metadata), self._tokens.current()))

    def _owner(self, token: str, known: Sequence[_Token]) -> str:
        digest = hashlib.sha256(token.encode()).digest()
        owner = None
        for candidate in known:  # all of them: the time must not tell which one it was, or how much of it was right
            if self._equal(candidate.digest, digest):
                owner = candidate.name
        if owner is None:
            raise RefusalError(Reason.UNAUTHENTICATED, "the token isn't known")
        return owner


def _bearer(metadata: Metadata) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        raise RefusalError(Reason.UNAUTHENTICATED, "a token is needed (authorization: Bearer TOKEN)")
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != _SCHEME or not token:
        raise RefusalError(Reason.UNAUTHENTICATED, "authorization: expected one value, Bearer TOKEN")
    return token.strip()


def _certificate_name(auth_context: AuthContext) -> str:
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for value in auth_context.get(key, ()):
            if value:
                return _printable(value.decode("utf-8", "replace"))
    return ""


@lru_cache(maxsize=1024)  # a connection's calls have one peer
def _address(peer: str) -> str:
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def _printable(name: str) -> str:
    """Return a name that can't break a line of the log in two."""
    return "".join(character if character.isprintable() else "?" for character in name)


def _read_tokens(path: Path, content: bytes) -> Sequence[_Token]:
    tokens: dict[bytes, _Token] = {}
    for number, line in enumerate(_text(path, content).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        token = _read_line(words, f"{path}: line {number}")
        if token.digest in tokens:
            raise ValueError(f"{path}: line {number}: the token of another line")
        tokens[token.digest] = token
    if not tokens:
        raise ValueError(f"{path}: no tokens; no caller could be let in")
    warn_if_open_to_others(path, _log)
    return tuple(tokens.values())


def _text(path: Path, content: bytes) -> str:
    try:
        return decode_text(content)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None  # the error itself would quote what is there
    except ValueError as error:  # of another encoding's byte order mark
        raise ValueError(f"{path}: {error}") from error


def _read_line(words: Sequence[str], place: str) -> _Token:
    if len(words) != 2:
        raise ValueError(f"{place}: expected NAME TOKEN")
    name, token = words
    if not (name.isprintable() and token.isascii() and token.isprintable()):
        raise ValueError(f"{place}: expected printable characters, in the token of ASCII")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ValueError(f"{place}: the token has fewer than {MIN_TOKEN_CHARACTERS} characters")
    return _Token(name, hashlib.sha256(token.encode()).digest())
