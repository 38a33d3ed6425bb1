"""Addresses as settings name them: HOST:PORT, and unix:PATH as gRPC has it."""

import os
import secrets
from pathlib import Path
from typing import Final
from urllib.parse import unquote

MAX_PATH_BYTES: Final = 107
"""Of a Unix socket's path on Linux, without the 0 at its end."""

_PRIVATE_NAME_BYTES = 8


def socket_path(target: str) -> Path:
    """Return the path of unix:PATH or unix:///PATH, which is percent-encoded as in gRPC's targets.

    Raises:
        ValueError: if it is anything else, or too long.
    """
    text = target.removeprefix("unix:")
    if text.startswith("//"):
        text = text.removeprefix("//")
        if not text.startswith("/"):
            raise ValueError("expected unix:PATH or unix:///ABSOLUTE_PATH")
    if "?" in text or "#" in text:
        raise ValueError("expected %3F and %23 in place of ? and # in a Unix socket's path")
    text = unquote(text, errors="surrogateescape")
    if not text or text.endswith("/") or "\0" in text:
        raise ValueError("a Unix socket needs a path, as in unix:/run/bilm.sock")
    n_bytes = max(len(os.fsencode(text)), len(os.fsencode(private_path(text))))
    if n_bytes > MAX_PATH_BYTES:
        raise ValueError(
            f"a Unix socket's path may have {MAX_PATH_BYTES} bytes, its name counting as {_PRIVATE_NAME_BYTES} at "
            f"least, found {n_bytes}"
        )
    return Path(text)


def private_path(path: str) -> str:
    """Return a path in the same folder that no other process uses."""
    folder, _, _ = path.rpartition("/")
    name = "." + secrets.token_hex(_PRIVATE_NAME_BYTES)[: _PRIVATE_NAME_BYTES - 1]
    return f"{folder}/{name}" if "/" in path else name


def split_address(listen: str, expected: str = "HOST:PORT") -> tuple[str, int]:
    """Return host and port of HOST:PORT; IPv6 is in brackets, which the host comes without.

    Raises:
        ValueError: if it is anything else.
    """
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (_is_host(host) and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f"expected {expected}")
    return host, int(port)


def _is_host(host: str) -> bool:
    """Return whether this can be looked up; what can't is a UnicodeError there, or a ValueError."""
    try:
        return bool(host.encode("idna")) and host.isprintable()
    except UnicodeError:
        return False
