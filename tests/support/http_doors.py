"""An HTTP door on a fake engine, in this process: milliseconds to start, and nothing may be left at its end."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from bilm_server.embedding.call_gate import CallGate
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.registry import Registry
from bilm_server.inference.types import Sentence
from bilm_server.protocols.http.bodies import Bodies
from bilm_server.protocols.http.door import HttpDoor
from bilm_server.protocols.http.endpoints import endpoints_of
from bilm_server.protocols.http.page_files import page_files
from bilm_server.protocols.http.routing import HttpApp
from bilm_server.security.auth import Authenticator
from bilm_server.security.callers import CallerRights

from tests.support.embedders import NO_LIMITS, embedding
from tests.support.fake_engine import FakeEngine
from tests.support.http_calls import Answer, call, connected, embeddings
from tests.support.served import EndedCalls

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
ONE = {"input": "a"}


def whole(body: bytes, headers: bytes = b"") -> bytes:
    """Return a request with further headers, a line each, and a body."""
    return HEAD + headers + b"content-length: %d\r\n\r\n" % len(body) + body


def statuses(answer: bytes) -> list[bytes]:
    """Return the status codes of the responses that came one behind another."""
    return [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]


@dataclass
class Opened:
    """A door that listens.

    Attributes:
        door: itself.
        app: behind it.
        ended: its calls.
    """

    door: HttpDoor
    app: HttpApp
    ended: EndedCalls

    async def embeddings(self, body: object = ONE, **options: Any) -> Answer:
        """Call it from a thread."""
        return await asyncio.to_thread(embeddings, self.door.address, body, **options)

    async def get(self, path: str, **headers: str) -> Answer:
        """Call it from a thread."""
        return await self.ask("GET", path, **headers)

    async def ask(self, method: str, path: str, **headers: str) -> Answer:
        """Call it from a thread; a header's underscores are hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await asyncio.to_thread(call, self.door.address, method, path, headers=named)

    async def connect(self) -> socket.socket:
        """Return a connection to it."""
        return await asyncio.to_thread(connected, self.door.address)


@asynccontextmanager
async def opened(
    *,
    engine: FakeEngine[Sentence] | None = None,
    max_connections: int = 8,
    loaded: bool = True,
    stall_s: float = 60.0,
    bodies: Bodies | None = None,
    caller_limits: CallerLimits = NO_LIMITS,
    **settings: Any,
) -> AsyncIterator[Opened]:
    """Yield a door that listens; nothing of a call may be left when it ends.

    Args:
        engine: what computes.
        max_connections: at a time.
        loaded: whether the model is.
        stall_s: that a client may take to read.
        bodies: receives them.
        caller_limits: of each caller.
        settings: of the door.
    """
    ended = EndedCalls()
    async with embedding(engine or FakeEngine()) as embedder:
        gate = CallGate(Authenticator(None), CallerRights((), authenticated=False), caller_limits, [ended])
        app = HttpApp(gate, lambda: loaded, (), stall_s, page=page_files(), bodies=bodies)
        settings = {"tls": lambda: None, **settings}
        door = HttpDoor("127.0.0.1:0", app, lambda: max_connections, **settings)
        await door.start()
        if loaded:
            app.open(endpoints_of(Registry(embedder.limits, embedder.conversions, [embedder])))
        try:
            yield Opened(door, app, ended)
        finally:
            await door.stop()
        assert door.n_connections == 0
