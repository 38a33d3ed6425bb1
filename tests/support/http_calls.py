"""Calls over HTTP by the standard library's client, and raw bytes by a socket."""

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

TIMEOUT_S = 60.0
JSON_TYPE = MappingProxyType({"content-type": "application/json"})


@dataclass(frozen=True)
class Answer:
    """A response.

    Attributes:
        status: its code.
        headers: by lower-case name.
        body: whole.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The reason of a refusal."""
        found: str = self.json["error"]["code"]
        return found

    @property
    def message(self) -> str:
        """The message of a refusal."""
        found: str = self.json["error"]["message"]
        return found


def call(
    address: str,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: Mapping[str, str] = MappingProxyType({}),
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Call on a connection of its own.

    Args:
        address: HOST:PORT.
        method: GET, POST, …
        path: with a slash before it.
        body: bytes, or what becomes JSON; None: no body.
        headers: beside the content's type.
        tls: trusts the server; None: no TLS.
    """
    host, _, port = address.rpartition(":")
    connection: http.client.HTTPConnection
    if tls is None:
        connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    else:
        connection = http.client.HTTPSConnection(host, int(port), timeout=TIMEOUT_S, context=tls)
    try:
        return call_on(connection, method, path, body, headers)
    finally:
        connection.close()


def call_on(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Answer:
    """Call on a connection that may be used again."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, content, {**(JSON_TYPE if content is not None else {}), **headers})
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def embeddings(address: str, body: object, **options: Any) -> Answer:
    """Call /v1/embeddings."""
    return call(address, "POST", "/v1/embeddings", body, **options)


def connected(address: str) -> socket.socket:
    """Return a socket that is connected."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def raw_request(path: str, body: object, accept: str = "*/*") -> bytes:
    """Return the bytes of a POST with JSON."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\naccept: {accept}\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def deaf_client(address: str, request: bytes) -> socket.socket:
    """Return a connection whose client has sent a request and never reads; its kernel takes little of the response."""
    host, _, port = address.rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(TIMEOUT_S)
    connection.connect((host, int(port)))
    connection.sendall(request)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the server closes; that it does so at once, with unread bytes, is an end, too."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found
