"""`coalesce_ms` through whole clients and real channels, both kinds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from bilm_client import Chosen, RetryPolicy, SentenceError, errors
from bilm_client._core.settings import Settings
from bilm_client.testing.models import FakeModel

if TYPE_CHECKING:
    from tests.support.scripted import Hold, Scripted
    from tests.unit.client.conftest import Connect, Either

NEVER_MS = 50_000  # less than the time-out of a call, which waits for others only if it has the time
UNDER_WAY, FIRST = 8, ["first"] * 64
ONE_ATTEMPT = RetryPolicy(max_attempts=1)
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
INVALID = grpc.StatusCode.INVALID_ARGUMENT

Together = Callable[..., list[Any]]


@pytest.fixture
def together(scripted: Scripted) -> Iterator[Together]:
    """Embeds the sentences of several calls at once; errors take the results' places.

    So much is under way that the calls gather until they are 64 sentences.
    """
    with ThreadPoolExecutor(16) as pool:

        def run(client: Either, *calls: Any, **options: Any) -> list[Any]:
            client.model_info()
            scripted.service.embed_requests.clear()
            script = list(scripted.service.embed_acts)
            scripted.service.embed_acts.clear()
            holds = [scripted.hold_next() for _ in range(UNDER_WAY)]
            scripted.service.embed_acts.extend(script)
            if client.runner is None:
                first = [pool.submit(client.embed, FIRST, **options) for _ in holds]
                assert all(hold.arrived.wait(60) for hold in holds)
                futures = [pool.submit(client.embed, call, **options) for call in calls]
                found = [future.exception(60) or future.result() for future in futures]
                release(holds)
                for future in first:
                    future.result(60)
                return found
            return client.runner.run(_in_tasks(client, holds, calls, options))

        yield run


async def _in_tasks(client: Either, holds: list[Hold], calls: Any, options: Any) -> list[Any]:
    first = [asyncio.ensure_future(client.client.embed(FIRST, **options)) for _ in holds]
    for hold in holds:
        await asyncio.to_thread(hold.arrived.wait, 60)
    found = await asyncio.gather(*(client.client.embed(call, **options) for call in calls), return_exceptions=True)
    release(holds)
    await asyncio.gather(*first)
    return found


def release(holds: list[Hold]) -> None:
    for hold in holds:
        hold.released.set()


def requests_of(scripted: Scripted) -> list[int]:
    """Sentences of each request, those that were under way left out."""
    return [len(request.sentences) for request in scripted.service.embed_requests[UNDER_WAY:]]


def test_calls_share_a_request_and_get_what_they_would_alone(
    connect: Connect, scripted: Scripted, together: Together
) -> None:
    calls = [[f"a{n} b" for n in range(32)], [["c", f"d{n}"] for n in range(30)], "e f", [["g"]]]
    found = together(connect(coalesce_ms=NEVER_MS), *calls, layers="average", dtype="float16")
    assert requests_of(scripted) == [64]
    plain = connect()
    for call, results in zip(calls, found, strict=True):
        for expected, result in zip(plain.embed(call, layers="average", dtype="float16"), results, strict=True):
            assert (result.tokens, result.offsets, result.model_version) == (
                expected.tokens,
                expected.offsets,
                expected.model_version,
            )
            np.testing.assert_array_equal(result.vectors, expected.vectors)


@pytest.mark.parametrize("can_choose", [True, False])
def test_calls_that_choose_share_requests(
    connect: Connect, scripted: Scripted, together: Together, can_choose: bool
) -> None:
    if not can_choose:
        scripted.service.serve(FakeModel(features=()))
    calls: list[Any] = [[Chosen(f"a{n} b c", rows=[2, 0]) for n in range(31)], [["c", f"d{n}"] for n in range(32)]]
    calls.append(Chosen(["c", "d", "e"], spans=[(0, 2), (1, 3)]))
    found = together(connect(coalesce_ms=NEVER_MS), *calls, layers="top", pool="max")
    if can_choose:
        assert requests_of(scripted) == [64]
    plain = connect()
    for call, results in zip(calls, found, strict=True):
        for expected, result in zip(plain.embed(call, layers="top", pool="max"), results, strict=True):
            assert (result.tokens, result.vectors.shape) == (expected.tokens, expected.vectors.shape)
            np.testing.assert_array_equal(result.vectors, expected.vectors)


def test_a_lone_call_does_not_wait(connect: Connect, scripted: Scripted) -> None:
    assert [result.tokens for result in connect(coalesce_ms=NEVER_MS).embed(["a", "b"])] == [("a",), ("b",)]
    assert len(scripted.service.embed_requests) == 1


def test_calls_with_states_and_large_ones_go_by_themselves(
    connect: Connect, scripted: Scripted, together: Together
) -> None:
    client = connect(coalesce_ms=NEVER_MS)
    assert all(results[0].state for results in together(client, "a", "b", return_states=True))
    assert sorted(requests_of(scripted)) == [1, 1]
    assert [len(results) for results in together(client, ["a"] * 65, ["b"] * 70)] == [65, 70]
    assert sorted(requests_of(scripted)) == [65, 70]


@pytest.mark.parametrize(
    ("code", "reason", "pushback_ms"),
    [(INVALID, "MALFORMED_REQUEST", None), (EXHAUSTED, "RESPONSE_TOO_LARGE", -1), (EXHAUSTED, "CALLER_LIMIT", -1)],
)
def test_what_may_concern_one_call_is_repeated_call_by_call(  # noqa: PLR0917
    connect: Connect, scripted: Scripted, together: Together, code: Any, reason: str, pushback_ms: int | None
) -> None:
    scripted.fail_next(code, reason, pushback_ms, times=2)
    found = together(connect(coalesce_ms=NEVER_MS, retry=ONE_ATTEMPT), ["a"] * 32, ["b"] * 32)
    shared, *repeated = requests_of(scripted)
    assert (shared, repeated.count(32)) == (64, 2)
    whole = [results for results in found if not isinstance(results, errors.BilmError)]
    if reason == "RESPONSE_TOO_LARGE":  # the call that failed again was cut in two
        assert [len(results) for results in whole] == [32, 32]
    else:
        assert len(whole) == 1
        assert [each.reason for each in found if isinstance(each, errors.ServiceError)] == [reason]


def test_overload_goes_to_all_with_its_pushback(connect: Connect, scripted: Scripted, together: Together) -> None:
    scripted.fail_next(EXHAUSTED, "OVERLOADED", 250)
    found = together(connect(coalesce_ms=NEVER_MS, retry=ONE_ATTEMPT), ["a"] * 32, ["b"] * 32)
    assert [(type(each), each.retry_after_ms) for each in found] == [(errors.OverloadedError, 250)] * 2
    assert requests_of(scripted) == [64]


def test_a_shared_request_is_retried_once_for_all(connect: Connect, scripted: Scripted, together: Together) -> None:
    scripted.fail_next(grpc.StatusCode.UNAVAILABLE)
    retry = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
    found = together(connect(coalesce_ms=NEVER_MS, retry=retry), ["a"] * 32, ["b"] * 32)
    assert [len(results) for results in found] == [32, 32]
    assert requests_of(scripted) == [64, 64]


def test_a_failed_sentence_concerns_its_own_call(connect: Connect, scripted: Scripted, together: Together) -> None:
    scripted.service.fake.failures["bad"] = "TOKEN_EMPTY"
    good, bad = together(connect(coalesce_ms=NEVER_MS), ["a"] * 32, ["b"] * 31 + ["bad"])
    assert len(good) == 32
    assert isinstance(bad, SentenceError)
    assert (bad.index, bad.reason) == (31, "TOKEN_EMPTY")
    assert requests_of(scripted) == [64]


def test_another_version_than_expected_concerns_all(connect: Connect, scripted: Scripted, together: Together) -> None:
    scripted.fail_next(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_VERSION_MISMATCH")
    client = connect(coalesce_ms=NEVER_MS)
    found = together(client, ["a"] * 32, ["b"] * 32)
    assert [type(each) for each in found] == [errors.ModelVersionError] * 2
    asked = scripted.service.get_model_count
    client.embed("a")
    assert scripted.service.get_model_count == asked + 1


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (math.inf, ValueError), (math.nan, ValueError), ("5", TypeError), (True, TypeError)],
)
def test_what_coalesce_ms_may_be(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="coalesce_ms must be"):
        Settings(target="a", coalesce_ms=value)


@pytest.mark.parametrize(("value", "expected"), [(None, 0.0), (0, 0.0), (2.5, 0.0025)])
def test_none_and_zero_are_off(value: float | None, expected: float) -> None:
    assert Settings(target="a", coalesce_ms=value).coalesce_s == expected


@pytest.mark.parametrize("value", [None, 0])
def test_without_it_each_call_has_its_own_request(
    connect: Connect, scripted: Scripted, together: Together, value: float | None
) -> None:
    together(connect(coalesce_ms=value), ["a"] * 32, ["b"] * 32)
    assert requests_of(scripted) == [32, 32]
