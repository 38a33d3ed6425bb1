"""What a call gets of the response or the failure that it shares."""

import grpc
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import errors

from tests.support.shared_calls import (
    SERVICE,
    BusyCoalescer,
    CountedWaiter,
    call_of,
    group_of,
    joined,
    sent,
    taken,
)

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_each_call_gets_its_own_results() -> None:
    busy = BusyCoalescer()
    calls = [call_of(["a", "b"]), call_of("c"), call_of(["d", "e", "f"])]
    joined(busy, *calls)
    response = SERVICE.embed(sent(busy, group_of(calls[0])))
    busy.end(group_of(calls[0]), response)
    assert [[tuple(each.embedding.tokens) for each in taken(call)] for call in calls] == [
        [("a",), ("b",)],
        [("c",)],
        [("d",), ("e",), ("f",)],
    ]
    assert [call.waiter.count for call in calls if isinstance(call.waiter, CountedWaiter)] == [1, 1, 1]


def test_another_number_of_results_concerns_all() -> None:
    busy, mine, other = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, mine, other)
    sent(busy, group_of(mine))
    busy.end(group_of(mine), pb.EmbedResponse(results=[pb.EmbedResult()] * 3))
    for call in (mine, other):
        with pytest.raises(errors.MalformedResponseError, match="expected 2 results, got 3"):
            call.take()


@pytest.mark.parametrize(
    "error",
    [
        errors.OverloadedError("busy", code=EXHAUSTED, reason="OVERLOADED", pushback_ms=250),
        errors.UnavailableError("away", code=grpc.StatusCode.UNAVAILABLE, reason="SHUTTING_DOWN"),
        errors.DeadlineError("late", code=grpc.StatusCode.DEADLINE_EXCEEDED),
        errors.ModelVersionError("other", code=grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_a_failure_goes_to_all_with_its_pushback(error: errors.ServiceError) -> None:
    busy, mine, other = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, mine, other)
    sent(busy, group_of(mine))
    busy.end(group_of(mine), error)
    raised = []
    for call in (mine, other):
        with pytest.raises(type(error)) as caught:
            call.take()
        raised.append(caught.value)
        assert (caught.value.code, caught.value.reason, caught.value.pushback_ms, str(caught.value)) == (
            error.code,
            error.reason,
            error.pushback_ms,
            str(error),
        )
    assert len({id(each) for each in (*raised, error)}) == 3


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError("bad", code=grpc.StatusCode.INVALID_ARGUMENT, reason="TOO_MANY_TOKENS"),
        errors.ResourceExhaustedError("large", code=EXHAUSTED, reason="RESPONSE_TOO_LARGE", pushback_ms=-1),
        errors.ResourceExhaustedError("large", code=EXHAUSTED, reason="CALLER_LIMIT", pushback_ms=-1),
    ],
)
def test_what_may_concern_one_call_is_repeated_call_by_call(error: errors.ServiceError) -> None:
    busy, mine, other, alone = BusyCoalescer({}, {"pool": "max"}), call_of("a"), call_of("b"), call_of("c", pool="max")
    joined(busy, mine, other, alone)
    for call in (mine, alone):
        sent(busy, group_of(call))
        busy.end(group_of(call), error)
    assert mine.take() is other.take() is None
    with pytest.raises(type(error)):
        alone.take()
