"""Interactive calls beside batch calls and streams that take all they may, on a real server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bilm_api.constants import Priority
from bilm_client import Client, Embedding, RetryPolicy
from bilm_client.errors import OverloadedError
from bilm_server.embedding.admission import Reservation

from tests.support.servers import LoopServer, serving

TEXTS = [[f"w{number % 50}" for number in range(first, first + 3 + 7 * first % 40)] for first in range(60)]
"""Of 3 to 42 words."""
LIMITS = ("--max-rows=8", "--max-tokens-in-flight=600", "--max-waiting-tokens=8000", "--max-tokens-per-request=400")
NO_RETRY = RetryPolicy(max_attempts=1)


@pytest.fixture(scope="module")
def small() -> Iterator[LoopServer]:
    with serving(*LIMITS, "--max-tokens-per-sentence=100") as server:
        yield server


@pytest.fixture(scope="module")
def alone(small: LoopServer) -> list[Embedding]:
    with Client(small.target) as client:
        return [client.embed([text])[0] for text in TEXTS]


def same_bits(found: list[Embedding], expected: list[Embedding]) -> bool:
    return all(np.array_equal(a.vectors, b.vectors) for a, b in zip(found, expected, strict=True))


def test_both_get_the_bits_that_each_sentence_has_alone(small: LoopServer, alone: list[Embedding]) -> None:
    def embed(priority: Priority) -> list[Embedding]:
        with Client(small.target) as client:
            return client.embed(TEXTS, priority=priority.value)

    def stream(priority: Priority) -> list[Embedding]:
        with Client(small.target) as client:
            return list(client.embed_stream(TEXTS, priority=priority.value))

    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(way, priority) for way in (embed, stream) for priority in 2 * list(Priority)]
        assert all(same_bits(call.result(), alone) for call in calls)
    small.check_nothing_is_left()


def test_batch_is_refused_where_interactive_calls_are_not(small: LoopServer) -> None:
    admission, text = small.admission, [["w"] * 90]

    async def fill() -> Reservation:
        return admission.reserve(admission.capacity.for_batch(), lambda: 250, Priority.BATCH)

    async def release() -> None:
        held.release()

    held: Reservation = small.call(fill)
    with Client(small.target, retry=NO_RETRY) as client:
        with pytest.raises(OverloadedError):
            client.embed(text, priority="batch")
        assert len(client.embed(text)) == 1
        small.call(release)
        assert len(client.embed(text, priority="batch")) == 1
