"""A pytest fixture that starts a real server: `from bilm_client.testing.pytest_plugin import bilm_server`."""

from collections.abc import Iterator

import pytest

from bilm_client.testing.server import RunningServer, ServerProcess


@pytest.fixture(scope="session")
def bilm_server() -> Iterator[RunningServer]:
    """Start a real server on a tiny random model, one for the whole session; connect to its `.target`."""
    with ServerProcess() as server:
        yield server
