"""From ASGI to the endpoints: what every HTTP call passes through, whether or not the model is loaded.

Every path is guarded, those that don't exist included, but /healthz, /readyz and the files of the page.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from types import MappingProxyType
from typing import Any, Final

from bilm_api.constants import REQUEST_ID_KEY, Reason

from bilm_server.embedding.call_gate import CallGate
from bilm_server.errors import CallerGoneError, Code, RefusalError, internal_error
from bilm_server.observability.call_record import (
    UNKNOWN_METHOD,
    CallRecord,
    Metadata,
    caller_request_id,
    request_arrived,
)
from bilm_server.protocols.grpc.late_service import RETRY_AFTER_MS
from bilm_server.protocols.http import names
from bilm_server.protocols.http.bodies import Bodies, Receive
from bilm_server.protocols.http.connection import MAX_HEAD_BYTES, Connection, connection_of
from bilm_server.protocols.http.hosts import AllowedHosts, split_target
from bilm_server.protocols.http.messages import HttpRefusalError, HttpRequest, HttpResponse, method_refused, refused
from bilm_server.protocols.http.page_files import PageFile

DEFAULT_TIMEOUT_S: Final = 60.0
"""Deadline of a call that has no header `timeout`."""
_CHUNK_BYTES = 256 * 1024
_CONTINUE: Final = "100-continue"
_SECONDS: Final = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # float() takes 1_0, too

_log = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]
Endpoint = Callable[[HttpRequest], Awaitable[HttpResponse]]


@dataclass(frozen=True)
class Route:
    """A path.

    Attributes:
        name: of its calls, in access log, metrics and traces.
        method: GET or POST.
        is_folder: whether it stands for the paths below it.
    """

    name: str
    method: str
    is_folder: bool = False


ROUTES: Final[Mapping[str, Route]] = {
    "/v1/embeddings": (_embeddings := Route(names.EMBEDDINGS, "POST")),
    "/embeddings": _embeddings,
    "/v1/embed": Route(names.EMBED, "POST"),
    "/v1/models": Route(names.MODELS, "GET"),
    "/v1/models/": Route(names.MODELS, "GET", is_folder=True),
    "/metrics": Route(names.METRICS, "GET"),
    "/openapi.json": Route(names.OPENAPI, "GET"),
}
"""Paths of the guarded endpoints; a folder's ends with a slash."""
OPEN_PATHS: Final = ("/healthz", "/readyz")
"""Paths that anybody may ask for, whatever host they name."""


class _Exchange:
    """A request as ASGI has it, and what is read of it at once."""

    def __init__(self, connection: Connection, scope: Mapping[str, Any], receive: Receive) -> None:
        self.connection, self.scope, self.receive = connection, scope, receive
        pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        self.metadata: Metadata = tuple(pairs)
        self.headers = dict(pairs)
        host, self.path = split_target(scope["raw_path"].decode("latin-1"))
        self.host = self.headers.get("host", "") if host is None else host
        self.route, self.tail = _find(self.path)

    @property
    def head_bytes(self) -> int:
        """Bytes of the request line and the headers, about."""
        line = len(self.scope["raw_path"]) + len(self.scope["query_string"])
        return line + sum(len(name) + len(value) + 4 for name, value in self.scope["headers"])


class HttpApp:
    """An ASGI application; used from the event loop only."""

    def __init__(
        self,
        gate: CallGate,
        serving: Callable[[], bool],
        hosts: Collection[str],
        stall_s: float,
        *,
        endpoints: Mapping[str, Endpoint] = MappingProxyType({}),
        page: Mapping[str, PageFile] = MappingProxyType({}),
        bodies: Bodies | None = None,
    ) -> None:
        """Keep what calls pass through.

        Args:
            gate: comes before a byte of the body is looked at.
            serving: returns what /readyz reports.
            hosts: see `AllowedHosts`.
            stall_s: seconds that a client may take to read a part of a response.
            endpoints: those that need no model, by the names of their routes.
            page: files that anybody may have who names an allowed host, by their paths.
            bodies: receives them.
        """
        self._gate, self._serving, self._stall_s = gate, serving, stall_s
        self._hosts, self._bodies = AllowedHosts(hosts), bodies or Bodies()
        self._endpoints, self._page = endpoints, page

    def open(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Take the endpoints of the loaded model, by the names of their routes; from here on calls reach them."""
        self._endpoints = {**self._endpoints, **endpoints}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; part of ASGI's interface."""
        connection = connection_of(scope)
        connection.run(asyncio.current_task())
        exchange = _Exchange(connection, scope, receive)
        try:
            if exchange.path in OPEN_PATHS and scope["method"] in ("GET", "HEAD"):
                await self._send(connection, self._health(exchange.path), send)
            elif (file := self._page.get(exchange.path)) is not None:
                await self._send(connection, self._page_file(exchange, file), send)
            else:
                await self._guarded(exchange, send)
        except asyncio.CancelledError:
            if not connection.lost:
                raise
        finally:
            connection.run(None)

    def _health(self, path: str) -> HttpResponse:
        healthy = path == "/healthz" or self._serving()
        return HttpResponse(b"ok\n" if healthy else b"not ready\n", 200 if healthy else 503, "text/plain")

    def _page_file(self, exchange: "_Exchange", file: PageFile) -> HttpResponse:
        try:
            self._hosts.check(exchange.host)
            return file.response(exchange.scope["method"], exchange.headers)
        except HttpRefusalError as refusal:
            return refused(refusal)

    async def _guarded(self, exchange: "_Exchange", send: Send) -> None:
        """Answer a call so that every way to fail ends in a response, and every end is observed."""
        connection, metadata = exchange.connection, exchange.metadata
        name = UNKNOWN_METHOD if exchange.route is None else exchange.route.name
        call = CallRecord(name, connection.peer, metadata, caller_request_id(metadata))
        try:
            try:
                with self._gate.call(call, connection.auth_context, keeps_held=True):
                    response = await self._run(call, self._answer(exchange))
            except RefusalError as refusal:
                response = refused(refusal)
            await self._send(connection, response, send, call.request_id)
        except CallerGoneError:
            return
        finally:
            call.held.close()

    async def _run(self, call: CallRecord, response: Awaitable[HttpResponse]) -> HttpResponse:
        """Await a call's response; what it raises becomes a RefusalError, or has its code in the record."""
        try:
            return await response
        except RefusalError:
            raise
        except CallerGoneError:
            call.code = Code.CANCELLED
            raise
        except Exception as error:
            _log.error("%s failed", call.method, exc_info=error)
            raise internal_error() from error

    async def _answer(self, exchange: "_Exchange") -> HttpResponse:
        route = self._checked(exchange)
        headers = exchange.headers
        timeout_s = _timeout_s(headers)
        endpoint = self._endpoints.get(route.name)
        if endpoint is None:
            raise RefusalError(Reason.MODEL_LOADING, "the model is being loaded; try again", RETRY_AFTER_MS)
        call_deadline_s = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                body = b""
                if route.method == "POST":
                    deadline_s = exchange.connection.request_deadline_s
                    body = await self._bodies.receive(headers, exchange.receive, deadline_s)
                    request_arrived(len(body))
                return await endpoint(HttpRequest(headers, body, call_deadline_s, exchange.tail))
        except TimeoutError:
            raise RefusalError(Reason.DEADLINE_EXCEEDED, f"the call took longer than {timeout_s:g} s") from None

    def _checked(self, exchange: "_Exchange") -> Route:
        """Return the route of a request, or refuse what no endpoint should see."""
        if exchange.head_bytes > MAX_HEAD_BYTES:
            raise HttpRefusalError(f"the headers have more than {MAX_HEAD_BYTES} bytes", status=431)
        if {
            "content-length",
            "transfer-encoding",
        } <= exchange.headers.keys():  # what stands before us may read the other
            raise HttpRefusalError(
                "content-length and transfer-encoding: expected one of them", headers={"connection": "close"}
            )
        if exchange.headers.get("expect", _CONTINUE).lower() != _CONTINUE:
            raise HttpRefusalError(f"expect: expected {_CONTINUE}, or nothing", status=417)
        self._hosts.check(exchange.host)
        route = exchange.route
        if route is None:
            raise HttpRefusalError("this server has no such path", reason=Reason.METHOD_NOT_FOUND)
        method = exchange.scope["method"]
        if method != route.method and (method, route.method) != ("HEAD", "GET"):
            raise method_refused(route.method)
        return route

    async def _send(self, connection: Connection, response: HttpResponse, send: Send, request_id: str = "") -> None:
        """Send a response; a client that reads too slowly loses its connection."""
        headers = {
            "content-type": response.content_type,
            "content-length": str(len(response.body)),
            "date": formatdate(usegmt=True),
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
            **response.headers,
        }
        if request_id:
            headers[REQUEST_ID_KEY] = request_id
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        body = memoryview(response.body)
        try:
            await send({"type": "http.response.start", "status": response.status, "headers": encoded})
            for begin in range(0, max(len(body), 1), _CHUNK_BYTES):
                part, end = body[begin : begin + _CHUNK_BYTES], begin + _CHUNK_BYTES
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": part, "more_body": end < len(body)})
                    await connection.flushed()
        except TimeoutError:
            _log.info("a client didn't read its response for %g s: its connection is ended", self._stall_s)
            connection.abort()


def _find(path: str) -> tuple[Route | None, str]:
    """Return the route of a path, and what the path has behind it."""
    if (route := ROUTES.get(path)) is not None and not route.is_folder:
        return route, ""
    folder, _, name = path.rpartition("/")
    route = ROUTES.get(f"{folder}/")
    return (route, name) if route is not None and name else (None, "")


def _timeout_s(headers: Mapping[str, str]) -> float:
    """Return the seconds that a call may take, by its header `timeout`."""
    given = headers.get("timeout")
    if given is None:
        return DEFAULT_TIMEOUT_S
    found = float(given) if _SECONDS.fullmatch(given) else math.nan
    if not 0 < found < math.inf:
        raise HttpRefusalError("timeout: expected seconds, more than 0")
    return found
