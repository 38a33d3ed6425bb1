"""Memory and descriptors: of a process of this machine, or from a server's Prometheus page."""

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bilm_client.cli.settings_sources import UsageError
from bilm_system.proxies import is_local_url

_PAGE_TIMEOUT_S = 2.0
_MOST_PAGE_BYTES = 16 * 2**20
_LINE = r"^{name}(?:\{{[^}}]*\}})?\s+(\S+)"
_PAGE_SIZE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process uses at one moment; None where that can't be read.

    Attributes:
        memory_bytes: Resident memory.
        descriptors: Open descriptors.
    """

    memory_bytes: int | None = None
    descriptors: int | None = None


ReadResources = Callable[[], Resources]


def of_process(process_id: int | None = None) -> Resources:
    """Read /proc (None: this process); of another user's process only the memory, of an ended one nothing."""
    folder = Path("/proc", "self" if process_id is None else str(process_id))
    try:
        pages = int((folder / "statm").read_text(encoding="ascii").split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return Resources()
    if not pages:  # it has ended, and its parent hasn't noticed
        return Resources()
    try:
        return Resources(pages * _PAGE_SIZE_BYTES, sum(1 for _ in (folder / "fd").iterdir()))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return Resources(pages * _PAGE_SIZE_BYTES)


def of_page(url: str, *, proxy: bool = True) -> Resources:
    """Read a Prometheus page; nothing while it is unavailable."""
    direct = [] if proxy and not is_local_url(url) else [urllib.request.ProxyHandler({})]
    try:
        with urllib.request.build_opener(*direct).open(url, timeout=_PAGE_TIMEOUT_S) as response:
            page = response.read(_MOST_PAGE_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return Resources()
    return Resources(_value(page, "process_resident_memory_bytes"), _value(page, "process_open_fds"))


def check_readable(read: ReadResources, name: str) -> None:
    """Read once, so that a wrong setting is reported before the run.

    Raises:
        UsageError: Nothing can be read; `name` is the setting.
    """
    if read() == Resources():
        raise UsageError(f"{name}: neither resident memory nor open descriptors can be read there")


def _value(page: str, name: str) -> int | None:
    found = re.search(_LINE.format(name=name), page, re.MULTILINE)
    return int(float(found[1])) if found else None
