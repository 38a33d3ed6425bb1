"""A script may end with streams open: at once, with its own exit code, and with nothing on standard error.

Other interpreters than the one that runs the tests: BILM_TEST_PYTHONS, paths separated by ":"; each needs the client's
dependencies. `pytest -m slow tests/unit/client/test_client_exit.py` runs 200 scripts on each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import bilm_api
import bilm_client
import pytest

if TYPE_CHECKING:
    from tests.support.scripted import Scripted

LIMIT_S = 60.0  # far more than a script takes on any machine: one that hasn't ended by then never will
PYTHONS = [sys.executable, *filter(None, os.environ.get("BILM_TEST_PYTHONS", "").split(":"))]
PACKAGES = os.pathsep.join(str(Path(package.__path__[0]).parent) for package in (bilm_client, bilm_api))

OPENING = """
import asyncio, atexit, gc, itertools, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from bilm_client import AsyncClient, Client

target = sys.argv[1]
client = Client(target)
sentences = [["a", "word"]] * 100
"""

# Several streams where one would do: each is another chance to hang.
LEFT_OPEN = {
    "the first result taken": """
streams = [client.embed_stream(sentences) for _ in range(8)]
print([next(stream).vectors.shape for stream in streams])
""",
    "half read": """
half = [client.embed_stream(sentences) for _ in range(4)]
for _, *_ in zip(range(50), *half): pass
""",
    "endless": """
endless = client.embed_stream(itertools.repeat("a"))
next(endless)
""",
    "never read": """
never = client.embed_stream(sentences)
""",
    "in a reference cycle": """
class Node: pass
for _ in range(4):
    node = Node()
    node.itself, node.stream = node, client.embed_stream(sentences)
    next(node.stream)
""",
    "begun in other threads": """
pool = ThreadPoolExecutor(4)
begun = [client.embed_stream(sentences) for _ in range(4)]
list(pool.map(next, begun))
""",
    "the client closed": """
with Client(target) as closed:
    of_closed = [closed.embed_stream(sentences) for _ in range(4)]
    for stream in of_closed: next(stream)
""",
    "the client dropped": """
dropped = Client(target).embed_stream(sentences)
next(dropped)
gc.collect()
""",
    "a daemon thread reads on": """
reading = threading.Event()
def read():
    while True:
        for _ in client.embed_stream(sentences): reading.set()
for _ in range(3): threading.Thread(target=read, daemon=True).start()
reading.wait()
""",
    "left behind by asyncio.run": """
async def leave():
    global left
    left = AsyncClient(target), AsyncClient(target)
    await left[0].embed("a")
    left += tuple(client.embed_stream(sentences) for client in left)
    for stream in left[2:]: await anext(stream)
asyncio.run(leave())
""",
    "of a loop that never runs again": """
async def begin():
    clients = [AsyncClient(target) for _ in range(4)]
    streams = [client.embed_stream(sentences) for client in clients]
    for stream in streams: await anext(stream)
    return clients, streams
stopped_loop = asyncio.new_event_loop()
of_stopped_loop = stopped_loop.run_until_complete(begin())
""",
    "of a loop that was closed": """
async def begin():
    clients = [AsyncClient(target) for _ in range(4)]
    streams = [client.embed_stream(sentences) for client in clients]
    for stream in streams: await anext(stream)
    return clients, streams
closed_loop = asyncio.new_event_loop()
of_closed_loop = closed_loop.run_until_complete(begin())
closed_loop.close()
""",
    "of a loop in a daemon thread": """
running = threading.Event()
async def go_on():
    while True:
        async for _ in AsyncClient(target).embed_stream(sentences): running.set()
threading.Thread(target=lambda: asyncio.run(go_on()), daemon=True).start()
running.wait()
""",
}
# Functions for the exit run in the reverse of the order in which they are registered.
EXIT_FUNCTIONS = f"""
import atexit
atexit.register(lambda: last())
{OPENING}
def last():
    try: list(client.embed_stream(sentences))
    except bilm_client.ClientClosedError as error: assert "shutting down" in str(error)
    else: os._exit(9)
import bilm_client.client
stream = client.embed_stream(sentences)
next(stream)
def first():
    if len(list(stream)) != 99: os._exit(8)
atexit.register(first)
"""
SYS_EXIT = "for _ in client.embed_stream(sentences): sys.exit(3)"
CTRL_C = """
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    for _ in client.embed_stream(itertools.repeat("a")): os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    sys.exit(130)
"""
# A call whose reader holds the call's lock nearly always, so that it is frozen with it.
LOCKED_CALL = """
import threading, time
import grpc
from bilm_client._transport.connection import GrpcConnection
from bilm_client._core.session import ResumableSession, stream_input
from bilm_client._core.settings import ResultTimeout, Settings
from bilm_client._transport.stream_sync import SyncStream
from bilm_client._core.keywords import StreamArguments
from bilm_client.testing.service import FakeService, FakeStream

# In names of their own: the frozen thread keeps them, and must not keep the stream beside them.
own = {"threading": threading, "time": time, "grpc": grpc, "FakeService": FakeService, "FakeStream": FakeStream}
exec('''
class Ended(grpc.RpcError): pass

class Call:
    def __init__(self, requests):
        self.lock, self.cancelled, self.callbacks, self.requests = threading.Lock(), False, [], requests
        self.stream = FakeStream(FakeService(), next(requests).start)
        self.answers = iter([self.stream.answer(next(requests).item)])
    def add_callback(self, callback):
        self.callbacks.append(callback)
        return True
    def cancel(self):
        with self.lock: self.cancelled = True
    def __iter__(self):
        return self
    def __next__(self):
        for answer in self.answers: return answer
        while not self.cancelled:
            with self.lock: time.sleep(0.05)
            time.sleep(0.001)
        for callback in self.callbacks: callback()
        raise Ended

def translate(_):
    return Exception()
''', own)

def open_stream(opening, deliver, deadline):
    return GrpcConnection(own["Call"], own["translate"], opening, deliver)

arguments = StreamArguments(return_state_every=1, window=1, window_tokens=1)
session = ResumableSession(arguments, Settings(target="unused:1"), uniform=float)
inputs = iter([stream_input("a", 0, False), stream_input("b", 1, False)])
source = SyncStream(session, inputs, open_stream=open_stream, wait=time.sleep, timeout=ResultTimeout(None), learn=tuple)
stream = source.run()
next(stream)
"""
ERROR = "for _ in client.embed_stream(sentences): raise ValueError('mine')"


def run(python: str, script: str, target: str) -> tuple[int, str]:
    """Exit code and standard error of a script.

    Raises:
        subprocess.TimeoutExpired: It hangs.
    """
    command = [python, "-W", "ignore::DeprecationWarning", "-c", script, target]
    environment = {**os.environ, "PYTHONPATH": PACKAGES}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("names", [list(LEFT_OPEN)[:9], list(LEFT_OPEN)[9:]], ids=["sync", "async"])
def test_a_script_ends_with_streams_open(answering: Scripted, names: list[str]) -> None:
    assert run(sys.executable, OPENING + "".join(LEFT_OPEN[name] for name in names), answering.target) == (0, "")


def test_no_lock_of_a_frozen_thread_is_taken(answering: Scripted) -> None:
    assert run(sys.executable, LOCKED_CALL, answering.target) == (0, "")


def test_functions_for_the_exit_may_read_on_or_are_refused(answering: Scripted) -> None:
    assert run(sys.executable, EXIT_FUNCTIONS, answering.target) == (0, "")


@pytest.mark.parametrize(("script", "code"), [(SYS_EXIT, 3), (CTRL_C, 130)], ids=["sys.exit", "Ctrl-C"])
def test_the_exit_code_stays_what_it_is(answering: Scripted, script: str, code: int) -> None:
    assert run(sys.executable, OPENING + script, answering.target) == (code, "")


def test_an_exception_in_the_loop_is_all_that_is_shown(answering: Scripted) -> None:
    code, shown = run(sys.executable, OPENING + ERROR, answering.target)
    assert code == 1
    assert shown.splitlines()[-1] == "ValueError: mine"
    assert shown.count("Traceback") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("python", PYTHONS)
def test_none_of_200_scripts_hangs(answering: Scripted, python: str) -> None:
    one = "stream = client.embed_stream(sentences)\nprint(next(stream).vectors.shape)\n"
    scripts = [one] * 200 + [script for script in LEFT_OPEN.values() for _ in range(10)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda script: run(python, OPENING + script, answering.target), scripts))
    assert [each for each in found if each != (0, "")] == []
