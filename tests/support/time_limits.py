"""A time limit on every test, its fixtures included, and on the end of the run.

pytest-timeout interrupts a test by a signal: the test fails, its fixtures are torn down, the run continues. Neither a C
extension that keeps the interpreter's lock is reached that way, nor the teardown of a test that has failed (the plugin
cancels its timer then), nor the interpreter's exit. There the watchdog of `faulthandler`, a thread that needs no lock,
prints all stacks and ends the process; pytest-xdist reports the test, starts another worker and continues.

The limits are markers and not an option of the configuration: under --strict-config, one more plugin's option would
keep a machine without that plugin from collecting anything.
"""

import faulthandler
import os
from collections.abc import Generator

import pytest

TEST_LIMIT_S = 300.0
"""For tests of some seconds, on a machine that is several times slower and does other work besides."""
SLOW_TEST_LIMIT_S = 2400.0
GRACE_S = 60.0
"""From a test's limit to the end of a process that didn't react; also what the interpreter has to exit."""

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error that the run began with; tests have theirs captured."""
    config.stash[_stderr] = os.dup(2)
    config.addinivalue_line("markers", "timeout(seconds): a test's time limit, enforced by pytest-timeout")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test a limit that has none of its own."""
    for item in items:
        if item.get_closest_marker("timeout") is None:
            limit_s = SLOW_TEST_LIMIT_S if item.get_closest_marker("slow") else TEST_LIMIT_S
            item.add_marker(pytest.mark.timeout(limit_s))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Bound the setup."""
    _watch(item)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Bound the test itself."""
    _watch(item)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Bound the teardown."""
    _watch(item)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Let nobody be bounded by the limit of a test that has ended."""
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Bound the interpreter's exit; the descriptor stays open for it.

    A worker of pytest-xdist comes here when its tests are done, and then waits for the others: its end is xdist's.
    """
    if hasattr(config, "workerinput"):
        return
    faulthandler.dump_traceback_later(GRACE_S, exit=True, file=config.stash[_stderr])


def _watch(item: pytest.Item) -> None:
    marker = item.get_closest_marker("timeout")
    assert marker is not None, "pytest_collection_modifyitems gives one to every test"
    faulthandler.dump_traceback_later(marker.args[0] + GRACE_S, exit=True, file=item.config.stash[_stderr])
