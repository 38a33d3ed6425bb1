"""Forked processes: a Client has a channel of its own there, an AsyncClient refuses; and clients pickle.

Forks are made in scripts, in processes of their own: pytest's has threads of the server's.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
from bilm_client import AsyncClient, Client, RetryPolicy
from bilm_client.testing import FakeAsyncClient, FakeClient

if TYPE_CHECKING:
    from tests.support.scripted import Scripted

LIMIT_S = 60.0
OPENING = """
import asyncio, multiprocessing, os, signal, sys, threading, time, warnings
from bilm_client import AsyncClient, Client, ClientClosedError
from bilm_client.errors import ForkedError

warnings.simplefilter("ignore", DeprecationWarning)  # since 3.12 Python warns of each fork beside threads
target = sys.argv[1]
client = Client(target, timeout_s=20)
sentences = [["a", "word"]] * 100

def use(client, streamed=5):
    assert len(client.embed(["a b"])) == 1
    assert len(list(client.embed_stream([["a", "word"]] * streamed))) == streamed

def in_child(function, exit=os._exit):
    child = os.fork()
    if not child:
        signal.alarm(30)  # a child that hangs is killed
        try:
            function()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        exit(0)
    assert os.waitpid(child, 0)[1] == 0

def raises(kind, function):
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")
"""
SCRIPTS = {
    "a client that is new": "in_child(lambda: use(client))",
    "a client that was used": "use(client)\nin_child(lambda: use(client))\nuse(client)",
    "a client with a stream open": """
stream = client.embed_stream(sentences)
next(stream)
for _ in range(10): in_child(lambda: use(client))
in_child(lambda: use(Client(target, timeout_s=20)))
assert len(list(stream)) == 99
""",
    "a stream that another thread reads": """
begun = threading.Event()
found = []
def read():
    for each in client.embed_stream(["a"] * 3000):
        begun.set()
        found.append(each)
reader = threading.Thread(target=read)
reader.start()
begun.wait()
for _ in range(3): in_child(lambda: use(client))
reader.join()
assert len(found) == 3000
""",
    "a carried state": """
whole = [each.vectors for each in client.embed_stream(sentences, carry_state=True)]
stream = client.embed_stream(sentences, carry_state=True, return_state_every=3)
found = []
for number, each in enumerate(stream):
    found.append(each.vectors)
    if number in (0, 40): in_child(lambda: use(client))
assert all((one == other).all() for one, other in zip(whole, found, strict=True))
""",
    "the parent's stream": """
stream = client.embed_stream(sentences)
begun = client.embed_stream(["a"])
next(stream)
in_child(lambda: raises(ForkedError, lambda: next(stream)))
in_child(lambda: list(begun))  # nothing of it was opened yet
assert len(list(stream)) == 99
""",
    "a child that ends as processes do": """
stream = client.embed_stream(sentences)
next(stream)
for _ in range(5): in_child(lambda: use(client), exit=sys.exit)
def leave_open():
    global left
    left = client.embed_stream(sentences)
    next(left)
in_child(leave_open, exit=sys.exit)
assert len(list(stream)) == 99
""",
    "a child of a child": """
use(client)
stream = client.embed_stream(sentences)
next(stream)
def child():
    use(client)
    in_child(lambda: use(client))
in_child(child)
""",
    "closing": """
use(client)
in_child(client.close)
use(client)
client.close()
in_child(lambda: raises(ClientClosedError, lambda: client.embed("a")))
""",
    "while other threads call": """
stop = threading.Event()
def call():
    while not stop.is_set(): use(client)
threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads: thread.start()
for _ in range(5): in_child(lambda: use(client))
stop.set()
for thread in threads: thread.join()
""",
    "while other threads share requests": """
sharing = Client(target, timeout_s=20, coalesce_ms=1)
stop = threading.Event()
def call():
    while not stop.is_set(): use(sharing)
threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads: thread.start()
for _ in range(5): in_child(lambda: use(sharing))
stop.set()
for thread in threads: thread.join()
""",
    "threads of the child": """
from bilm_client._core.settings import Settings
from bilm_client._transport.grpc_sync import GrpcSyncTransport
from bilm_client.client import TransportClient

class Counted(Settings):
    def channel_arguments(self):
        channels.append(os.getpid())
        return super().channel_arguments()

channels = []
shared = TransportClient(Counted(target=target, timeout_s=20), GrpcSyncTransport)
use(shared)
def child():
    threads = [threading.Thread(target=use, args=[shared]) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert channels.count(os.getpid()) == 1
in_child(child)
assert channels == [os.getpid()]
""",
    "an AsyncClient": """
async def main():
    asynchronous = AsyncClient(target, timeout_s=20)
    await asynchronous.embed("a")
    stream = asynchronous.embed_stream(sentences)
    await anext(stream)
    def refused():
        for each in (asynchronous, AsyncClient(target)):
            for call in (each.embed("a"), each.model_info(), each.health()):
                raises(ForkedError, lambda: call.send(None))
            raises(ForkedError, lambda: each.embed_stream(["a"]))
        raises(ForkedError, lambda: anext(stream).send(None))
        raises(StopIteration, lambda: asynchronous.close().send(None))
        use(client)
    in_child(refused)
    assert len([each async for each in stream]) == 99
    await asynchronous.embed("a")
asyncio.run(main())
""",
    "an AsyncClient after all were closed": """
async def one():
    async with AsyncClient(target, timeout_s=20) as asynchronous:
        await asynchronous.embed("a")
asyncio.run(one())
in_child(lambda: asyncio.run(one()))
""",
    "without gRPC's fork support": """
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "False"
use(client)
in_child(lambda: raises(ForkedError, lambda: client.embed("a")))
in_child(lambda: raises(ForkedError, lambda: Client(target).embed("a")))
""",
}
MULTIPROCESSING = """
if __name__ == "__main__":
    stream = client.embed_stream(sentences)
    next(stream)
    for method in ("fork", "forkserver", "spawn"):
        process = multiprocessing.get_context(method).Process(target=use, args=[client])
        process.start()
        process.join(50)
        if process.is_alive(): process.kill()
        assert process.exitcode == 0, method
    assert len(list(stream)) == 99
"""
DATA_LOADER = """
from torch.utils.data import DataLoader, Dataset

class Embedded(Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return client.embed([[f"w{index}"]])[0].vectors[0, 0, 0]

if __name__ == "__main__":
    before = list(DataLoader(Embedded(), num_workers=2, timeout=30))  # of a client that isn't connected yet
    use(client)
    stream = client.embed_stream(sentences)
    next(stream)
    after = list(DataLoader(Embedded(), num_workers=2, timeout=30))
    assert before == after
    assert len(list(stream)) == 99
"""


def run(script: str, target: str, *, file: str = "") -> None:
    """Run a script, which must end well."""
    command = [sys.executable, file] if file else [sys.executable, "-c", script]
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [*command, target], capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


# The others are variations: of "a client with a stream open", of "a client that was used", or of "an AsyncClient".
# "an AsyncClient after all were closed" hangs in one of a hundred forks on a busy machine, while gRPC's poller ends.
QUICK = (
    "a client that is new",
    "a client that was used",
    "a client with a stream open",
    "the parent's stream",
    "closing",
    "threads of the child",
    "an AsyncClient",
    "without gRPC's fork support",
)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS if name not in QUICK)]
)
def test_in_a_forked_process(answering: Scripted, name: str) -> None:
    run(OPENING + SCRIPTS[name], answering.target)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(MULTIPROCESSING, id="multiprocessing"),
        pytest.param(DATA_LOADER, id="DataLoader", marks=pytest.mark.slow),
    ],
)
def test_workers(answering: Scripted, script: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("workers") / "workers.py"  # spawn imports the main module again, from its file
    file.write_text(OPENING + script, encoding="utf-8")
    run("", answering.target, file=str(file))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_pickles_as_its_arguments(kind: type[Client] | type[AsyncClient]) -> None:
    client = kind(
        "host:1",
        model="m",
        expected_model_version="v",
        timeout_s=3.0,
        retry=RetryPolicy(max_attempts=2),
        token="secret",
        metadata=(("a", "b"),),
        channel_options=(("grpc.x", 1),),
        proxy=False,
    )
    for other in (pickle.loads(pickle.dumps(client)), copy.copy(client), copy.deepcopy(client)):
        assert type(other) is kind
        assert other.__getstate__() == client.__getstate__()


def test_a_used_client_pickles_too(answering: Scripted) -> None:
    with Client(answering.target) as client:
        client.embed("a")
        with pickle.loads(pickle.dumps(client)) as other:
            assert other.embed("a")[0].tokens == ("a",)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_with_credentials_says_that_it_cannot_be_pickled(kind: type[Client] | type[AsyncClient]) -> None:
    with pytest.raises(TypeError, match="credentials: gRPC's can't be pickled"):
        pickle.dumps(kind("host:1", credentials=grpc.ssl_channel_credentials()))


def test_fakes_pickle_as_their_arguments() -> None:
    fake = pickle.loads(pickle.dumps(FakeClient(layer_count=2, width=4, failures={"bad": "TOKEN_EMPTY"})))
    assert fake.embed("a")[0].vectors.shape == (2, 1, 4)
    assert isinstance(pickle.loads(pickle.dumps(FakeAsyncClient())), FakeAsyncClient)
