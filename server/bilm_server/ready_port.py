"""A TCP port that is open while the server is ready: for balancers whose check can only connect.

The port of the calls is open before the warm-up, through a drain's delay and while the model fails, so a check that
only connects to it takes all of that for health.
"""

import asyncio
import logging
from typing import Final

_log = logging.getLogger("bilm_server.ready_port")

GREETING: Final = b"READY\n"
"""What whoever connects is told before the connection ends; a stopped process accepts, too, but says nothing."""


class ReadyPort:
    """Listens while it is told to, again and again on the same port."""

    def __init__(self, host: str, port: int) -> None:
        """Keeps its arguments.

        Args:
            host: to listen on.
            port: 0: any free one, the same each time.
        """
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Where it listens, once it has."""
        return self._port

    async def show(self, ready: bool) -> None:
        """Opens or closes the port; does nothing where that is done.

        Raises:
            OSError: if the port can't be opened.
        """
        if ready and self._server is None:
            self._server = await asyncio.start_server(_greet, self._host, self._port)
            self._port = self._server.sockets[0].getsockname()[1]
            _log.debug("open on %s:%d", self._host, self._port)
        elif not ready and self._server is not None:
            server, self._server = self._server, None
            server.close()
            await server.wait_closed()


async def _greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    writer.close()  # six bytes are in the kernel's buffer by now, whether or not they are read
