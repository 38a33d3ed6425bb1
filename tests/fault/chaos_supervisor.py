"""Keeps a server process running: whatever ends it, a new one takes its place at once."""

import threading
import time
from dataclasses import dataclass

from bilm_client.testing.server import ServerStartError

from tests.support.server_processes import START_TIMEOUT_S, ProcessServer

_LOOK_INTERVAL_S = 0.05


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        code: Its exit code, as `subprocess` has it.
        expected: The exit code that the fault should cause; None: nobody wanted it to end.
    """

    code: int
    expected: int | None


class Supervisor:
    """Runs the server in a thread of its own."""

    def __init__(self, server: ProcessServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=self._run, name="supervisor")
        self._stopping = threading.Event()
        self._expected: int | None = None
        self.serving = threading.Event()
        """Set while the present process has been seen SERVING."""
        self.ends: list[End] = []
        self.start_s: list[float] = []
        """How long each start took, until SERVING."""

    def start(self) -> None:
        """Starts the first process; returns when it is SERVING.

        Raises:
            AssertionError: It took too long.
        """
        self._server.launch()
        self._thread.start()
        assert self.serving.wait(START_TIMEOUT_S), "the server isn't SERVING"

    def stop(self) -> int:
        """Ends the present process by SIGTERM, for good; its exit code."""
        self._stopping.set()
        self._expected = 0
        code = self._server.terminate()
        self._thread.join()
        return code

    def ends_with(self, code: int) -> None:
        """Announces that the process is about to be ended, and how."""
        self.serving.clear()
        self._expected = code

    def give_up(self) -> None:
        """Kills whatever runs."""
        self._stopping.set()
        self._server.kill()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            process, begun_s = self._server.process, time.monotonic()
            try:
                self._server.wait_until_serving()
                self.start_s.append(time.monotonic() - begun_s)
                if self._expected is None:  # else it is about to be ended again
                    self.serving.set()
            except ServerStartError:
                if process.poll() is None:
                    process.kill()  # it hangs: the exit code, which nobody expects, will tell
            code = self._server.wait(None)
            self.serving.clear()
            self.ends.append(End(code, self._expected))
            if self._stopping.is_set():
                return
            self._expected = None
            self._server.launch()
