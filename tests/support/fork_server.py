"""Servers as forks of a process that has imported and compiled what all need: a start without its first seconds.

`ForkServer` is the tests' side; this module as a program is the other one. A fork is a process like any other: it has
its own arguments, environment, working folder, limits and signals, and ends by the interpreter's exit. What an
environment variable changes at import time, it doesn't see.
"""

import atexit
import contextlib
import importlib
import json
import os
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_MAX_REQUEST_BYTES = 2**20
_START_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class ForkRequest:
    """What a fork is to run.

    Attributes:
        module: whose `main` it runs.
        arguments: of `bilm-serve`.
        environment: all variables.
        folder: its working folder.
        max_descriptors: its limit of open files; None: the present one.
    """

    module: str
    arguments: Sequence[str]
    environment: dict[str, str]
    folder: str
    max_descriptors: int | None = None


class ForkedProcess:
    """A fork, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        """Take over the socket that the exit code comes by."""
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        weakref.finalize(self, status.close)

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code: negative, the signal that has ended the process.

        Raises:
            subprocess.TimeoutExpired: it still runs after that many seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0.0)
            said = self._status.recv(64, socket.MSG_PEEK)  # left there for other threads that wait, too
            assert said, "the fork server has died"
            self.returncode = int(said)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks; its end is the end of all its forks."""

    def __init__(self) -> None:
        """Call `start` to start it."""
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until it has compiled the kernels."""
        self._control, its_own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_own:
            command = [sys.executable, "-m", __name__, str(its_own.fileno())]
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # it would start its threads at import
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, pass_fds=[its_own.fileno()], stdin=subprocess.DEVNULL
            )
        self._control.settimeout(_START_TIMEOUT_S)
        assert self._control.recv(64) == b"ready", "the fork server has died"

    def fork(self, request: ForkRequest, output: int) -> ForkedProcess:
        """Start a server.

        Args:
            request: what it runs.
            output: the descriptor of its standard output and error.
        """
        assert self._control is not None, "it has not started"
        ours, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with status:
            socket.send_fds(self._control, [json.dumps(asdict(request)).encode()], [output, status.fileno()])
        return ForkedProcess(int(self._control.recv(64)), ours)

    def stop(self) -> None:
        """End it and its forks."""
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.wait()


@cache
def fork_server() -> ForkServer:
    """Return this process's fork server, started."""
    server = ForkServer()
    atexit.register(server.stop)
    server.start()
    return server


def stop_fork_server() -> None:
    """Stop this process's fork server, if it has one."""
    if fork_server.cache_info().currsize:
        fork_server().stop()


# ---- the other side ----


class _Forks:
    """The forks that run, and where to say how each of them has ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._status: dict[int, socket.socket] = {}

    def serve(self) -> ForkRequest | None:
        """Fork as asked; return in each fork with what it is to run, and here when the tests have gone."""
        watched, woken = socket.socketpair()
        for end in (watched, woken):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it comes to the tests, too
        signal.set_wakeup_fd(woken.fileno())
        with selectors.DefaultSelector() as selector, watched, woken:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(watched, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is watched:
                        watched.recv(4096)
                        self._reap()
                        continue
                    data, descriptors, _, _ = socket.recv_fds(self._control, _MAX_REQUEST_BYTES, 2)
                    if not data:
                        self._kill()
                        return None
                    if not self._fork(*descriptors):
                        signal.signal(signal.SIGINT, interrupt)
                        return ForkRequest(**json.loads(data))

    def _fork(self, output: int, status: int) -> bool:
        """Return whether this is the process that forks."""
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would miss the other threads"  # noqa: PTH208
        if pid := os.fork():
            os.close(output)
            self._status[pid] = socket.socket(fileno=status)
            self._control.send(str(pid).encode())
            return True
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.close(output)
        os.close(status)
        self._control.close()
        for other in self._status.values():
            other.close()
        return False

    def _reap(self) -> None:
        while self._status:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self._status.pop(pid) as status, contextlib.suppress(BrokenPipeError):
                status.send(str(os.waitstatus_to_exitcode(ended)).encode())

    def _kill(self) -> None:
        for pid in self._status:
            os.kill(pid, signal.SIGKILL)
        for pid in self._status:
            os.waitpid(pid, 0)


def _prepare() -> None:
    """Import all that a server imports, and compile its kernels; with one thread only, so that forks miss none."""
    import bilm_server.main
    import bilm_server.model_parts
    import bilm_server.observability.tracing  # noqa: F401
    import torch
    from bilm_server.config_sources import load_config
    from bilm_server.served_model import load_served_model

    torch.set_num_threads(1)
    load_served_model(load_config(["--model", "random:tiny", "--threads", "1"])).engine.warm_up()


def _run(request: ForkRequest) -> Any:
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    if request.max_descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (request.max_descriptors,) * 2)
    return importlib.import_module(request.module).main(list(request.arguments))


def _main() -> Any:
    import gc

    with socket.socket(fileno=int(sys.argv[1])) as control:
        _prepare()
        gc.collect()
        gc.freeze()
        control.send(b"ready")
        request = _Forks(control).serve()
    return 0 if request is None else _run(request)


if __name__ == "__main__":
    sys.exit(_main())
