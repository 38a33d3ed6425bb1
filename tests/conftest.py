"""What all tests share: the golden models, and where the data would be."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.fork_server import stop_fork_server
from tests.support.signals import reset_inherited_signals

pytest_plugins = ["tests.support.devices", "tests.support.garbage", "tests.support.time_limits"]

reset_inherited_signals()  # in the main thread of each worker, before any fixture starts a thread
for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):  # the tests' own channels go to this machine only
    os.environ[name] = ",".join(filter(None, (os.environ.get(name, ""), "localhost,127.0.0.1,::1")))
settings.register_profile("bilm", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("bilm")


def pytest_sessionfinish() -> None:
    """End what the session has started."""
    stop_fork_server()


DATA = Path(__file__).parent / "data"
GOLDEN = sorted((DATA / "golden").iterdir())


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name, scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """Each folder of golden vectors."""
    folder: Path = request.param
    return folder


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of public corpora; they are not part of the project (BILM_TEST_DATA names it)."""
    folder = Path(os.environ.get("BILM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the public corpora, which are not in {folder}; name their folder with BILM_TEST_DATA")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)  # the models are tiny: threads would only get in each other's way
