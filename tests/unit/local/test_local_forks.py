"""Forked and spawned processes, and the end of a process, in scripts: pytest's own has other threads."""

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 100.0
OPENING = """
import multiprocessing, os, signal, sys, threading, warnings
import numpy as np
from bilm_client.errors import ClientClosedError, ForkedError
from bilm_local import LocalEmbedder

warnings.simplefilter("ignore", DeprecationWarning)  # since 3.12 Python warns of each fork beside threads
sentences = [["a", "word"]] * 100

def new():
    return LocalEmbedder("random:tiny", device="cpu", tokenizer="whitespace")

def use(embedder):
    [found] = embedder.embed(["a b"])
    assert len(list(embedder.embed_stream(sentences))) == 100
    return found.vectors

def in_child(function, exit=os._exit):
    child = os.fork()
    if not child:
        signal.alarm(60)  # a child that hangs is killed
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

embedder = new()
"""
DATA = """
import torch
from torch.utils.data import DataLoader, Dataset

class Embedded(Dataset):
    def __init__(self, embedder): self.embedder = embedder
    def __len__(self): return 12
    def __getitem__(self, index):
        [found] = self.embedder.embed([["word", str(index)]], layers="top", pool="mean")
        return found.vectors.copy()

def load(embedder, context):
    loader = DataLoader(Embedded(embedder), batch_size=4, num_workers=2, multiprocessing_context=context)
    return torch.cat(list(loader)).numpy()
"""
SCRIPTS = {
    "an embedder that is new": "in_child(lambda: use(embedder))\nuse(embedder)",
    "an embedder that was used": """
expected = use(embedder)
def child():
    assert np.array_equal(use(embedder), expected)
    in_child(lambda: use(embedder))  # a child of a child
for _ in range(2): in_child(child)
use(embedder)
""",
    "while other threads call": """
use(embedder)
stop = threading.Event()
def call():
    while not stop.is_set(): use(embedder)
threads = [threading.Thread(target=call) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(3): in_child(lambda: use(embedder))
stop.set()
for thread in threads: thread.join()
""",
    "the parent's stream": """
stream = embedder.embed_stream(sentences)
next(stream)
in_child(lambda: raises(ForkedError, lambda: next(stream)))
assert len(list(stream)) == 99
""",
    "closing": """
use(embedder)
in_child(embedder.close)
use(embedder)
embedder.close()
in_child(lambda: raises(ClientClosedError, lambda: embedder.embed("a")))
""",
    "processes that end without closing": """
stream = embedder.embed_stream(sentences)
next(stream)
def leave_open():
    global left
    left = embedder.embed_stream(sentences)
    next(left)
in_child(leave_open, exit=sys.exit)
""",
    "data loaders that fork before and after": DATA
    + """
before = load(embedder, "fork")
expected = np.stack([Embedded(embedder)[index] for index in range(12)])
after = load(embedder, "fork")
assert np.array_equal(before, expected) and np.array_equal(after, expected)
""",
}
SPAWNING = (
    DATA
    + """
if __name__ == "__main__":
    expected = np.stack([Embedded(embedder)[index] for index in range(12)])
    assert np.array_equal(load(embedder, "spawn"), expected)
"""
)


def run(*arguments: str) -> None:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_forked_processes(script: str) -> None:
    run("-c", OPENING + script)


def test_a_data_loader_that_spawns(tmp_path: Path) -> None:
    script = tmp_path / "spawning.py"
    script.write_text(OPENING + SPAWNING, encoding="utf-8")
    run(str(script))
