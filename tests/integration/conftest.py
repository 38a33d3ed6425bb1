from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.integration_support import TINY, RunningServer, running


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server on a tiny model with random weights."""
    with running("--model", TINY) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers with flags of the test's own."""
    with ExitStack() as stack:
        yield lambda *flags, **machine: stack.enter_context(running("--model", TINY, *flags, **machine))


@pytest.fixture(scope="session")
def golden_server(golden: Path) -> Iterator[RunningServer]:
    """A server on each of the golden models."""
    with running("--model", str(golden)) as server:
        yield server
