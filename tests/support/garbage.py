"""Garbage is collected at the end of each test, so that what a test leaves open fails that test and not a later one.

A socket or a file in a reference cycle is warned about when the collector comes by, which pytest charges to the test
that happens to run: plots make so many cycles that it was one of theirs. To look through all objects takes half a
second after the imports and the kernels' compilation. So a test's end looks at what is young, and only a module's end
at all that has come since the last one; what is left then belongs to the session and is set aside.
"""

import gc
from collections.abc import Iterator

import pytest

_YOUNG = 1


def pytest_collection_finish() -> None:
    """Set aside what the imports have made."""
    _collect_and_set_aside()


@pytest.fixture(autouse=True, scope="module")
def _collect_garbage_of_module() -> Iterator[None]:
    yield
    _collect_and_set_aside()


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    yield
    gc.collect(_YOUNG)


def _collect_and_set_aside() -> None:
    gc.collect()
    gc.freeze()
