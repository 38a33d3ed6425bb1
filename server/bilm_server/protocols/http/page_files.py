"""The page at /: static files of this package, which need neither a token nor a loaded model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Final

from bilm_server.protocols.http.messages import HttpResponse, method_refused

INDEX: Final = "index.html"
FOLDER: Final = "page"
"""Of this package; also where the files but the index are on the HTTP port."""
_CONTENT_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY: Final = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # text never becomes markup
    "trusted-types 'none'",
)
_HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "content-security-policy": "; ".join(_POLICY),
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",  # kept, but asked for again: names don't change with their contents
    }
)


@dataclass(frozen=True)
class PageFile:
    """A static file.

    Attributes:
        body: its bytes.
        content_type: of the body.
        etag: names these bytes, as the header `ETag` has it.
    """

    body: bytes
    content_type: str
    etag: str

    def response(self, method: str, headers: Mapping[str, str]) -> HttpResponse:
        """Return the file, or status 304 for a client that has it.

        Args:
            method: of the request.
            headers: of the request, by lower-case name.

        Raises:
            HttpRefusalError: the method is neither GET nor HEAD.
        """
        if method not in ("GET", "HEAD"):
            raise method_refused("GET")
        own = {**_HEADERS, "etag": self.etag}
        if not _has(headers.get("if-none-match", ""), self.etag):
            return HttpResponse(self.body, content_type=self.content_type, headers=own)
        own["content-length"] = str(len(self.body))  # RFC 9110: that of the response with status 200, or none
        return HttpResponse(b"", 304, self.content_type, own)


def page_files() -> Mapping[str, PageFile]:
    """Read the files; return them by their paths on the HTTP port."""
    folder = files(__package__) / FOLDER
    found = {f"/{FOLDER}/{each.name}": _read(each) for each in folder.iterdir() if _suffix(each) in _CONTENT_TYPES}
    return {"/": found.pop(f"/{FOLDER}/{INDEX}"), **found}


def _read(file: Traversable) -> PageFile:
    body = file.read_bytes()
    return PageFile(body, _CONTENT_TYPES[_suffix(file)], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _suffix(file: Traversable) -> str:
    return f".{file.name.rpartition('.')[2]}"


def _has(if_none_match: str, etag: str) -> bool:
    """Return whether a client has a file, by what it sends; weak tags match as strong ones do (RFC 9110, 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]
