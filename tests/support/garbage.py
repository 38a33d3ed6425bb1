"""Garbage is collected at the end of each test, so that what a test leaves open fails that test and not a later one.

A socket or a file in a reference cycle is warned about when the collector comes by, which pytest charges to the test
that happens to run: plots make so many cycles that it was one of theirs. A collection is free here, because what the
imports have made is set aside first.
"""

import gc
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    """Set aside what there is before the first test: half a second for each collection that looks through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    yield
    gc.collect()
