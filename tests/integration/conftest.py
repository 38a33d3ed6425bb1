from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.servers import LoopServer, serving


@pytest.fixture(scope="session")
def server() -> Iterator[LoopServer]:
    """A server on a tiny model with random weights."""
    with serving() as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[..., LoopServer]]:
    """Starts servers with flags of the test's own."""
    with ExitStack() as stack:
        yield lambda *flags, **machine: stack.enter_context(serving(*flags, **machine))


@pytest.fixture(scope="session")
def golden_server(golden: Path) -> Iterator[LoopServer]:
    """A server on each of the golden models."""
    with serving("--model", str(golden)) as server:
        yield server
