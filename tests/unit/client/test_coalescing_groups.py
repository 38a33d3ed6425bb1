"""Which calls share a request, when it is sent, and what each gets back."""

import math
from dataclasses import replace
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import ClientClosedError, ScalarMix, errors
from bilm_client._core.coalescing import CallGroup, Coalescer, SharedCall, SharedResults, may_share
from bilm_client._core.settings import NO_DEADLINE, Deadline
from hypothesis import given
from hypothesis import strategies as st

from tests.support.shared_calls import (
    INFO,
    SERVICE,
    WAIT_S,
    BusyCoalescer,
    CountedWaiter,
    call_of,
    group_of,
    joined,
    planned_job,
    sent,
    taken,
    texts_of,
)

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
MIX = ScalarMix([1.0, 2.0, 3.0])


def test_up_to_eight_calls_go_by_themselves_at_once() -> None:
    coalescer = Coalescer(WAIT_S)
    calls = [call_of("a") for _ in range(9)]
    for call in calls[:8]:
        assert joined(coalescer, call) == [group_of(call)]
        sent(coalescer, group_of(call))
    assert joined(coalescer, calls[8], now_s=7.0) == []
    assert calls[8].sends_at_s == 7.0 + WAIT_S


def test_a_group_is_full_with_an_eighth_of_what_is_under_way() -> None:
    coalescer = Coalescer(WAIT_S)
    calls = [call_of("a") for _ in range(64)]
    groups = coalescer.join(calls, 0.0)
    assert [len(group.calls) for group in groups] == [8] * 8


def test_a_group_waits_so_long() -> None:
    busy, first, second = BusyCoalescer(), call_of("a"), call_of("b")
    busy.join([first], 7.0)
    busy.join([second], 7.004)
    assert group_of(first) is group_of(second)
    assert (first.sends_at_s, second.sends_at_s) == (7.0 + WAIT_S, math.inf)
    assert texts_of(sent(busy, group_of(first))) == ["a", "b"]
    assert first.sends_at_s == math.inf


def test_a_group_is_full_when_so_much_has_ended_and_others_may_join_until_it_is_sent() -> None:
    busy, early, late = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, early)
    *others, last = (group_of(call) for call in busy.under_way)
    for group in others:
        assert busy.end(group, SERVICE.embed(group.request())) == []
    assert early.sends_at_s == WAIT_S
    assert busy.end(last, SERVICE.embed(last.request())) == [group_of(early)]
    assert early.sends_at_s == -math.inf
    joined(busy, late)
    assert texts_of(sent(busy, group_of(early))) == ["a", "b"]


def test_calls_of_another_kind_do_not_count() -> None:
    busy, other = BusyCoalescer({"pool": "max"}), call_of("a")
    assert joined(busy, other) == [group_of(other)]


def test_after_it_was_sent_no_call_joins() -> None:
    busy, early, late = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, early)
    sent(busy, group_of(early))
    joined(busy, late)
    assert group_of(late) is not group_of(early)
    assert not busy.take(group_of(early))


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"layers": "top"}, {"layers": "average"}),
        ({"pool": "mean"}, {"pool": "max"}),
        ({"dtype": "float16"}, {}),
        ({"l2_normalize": True}, {}),
        ({"priority": "batch"}, {}),
        ({"layers": "mix", "mix": MIX}, {"layers": "mix", "mix": ScalarMix([1.0, 2.0, 4.0])}),
        ({"layers": "mix", "mix": MIX}, {"layers": "mix", "mix": replace(MIX, layer_norm=True)}),
    ],
)
def test_only_calls_with_equal_options_share(options: dict[str, Any], others: dict[str, Any]) -> None:
    busy = BusyCoalescer(options, others)
    mine, other, same = call_of("a", **options), call_of("b", **others), call_of("c", **options)
    joined(busy, mine, other, same)
    assert group_of(mine) is group_of(same) is not group_of(other)


def test_what_an_error_does_is_the_callers_affair() -> None:
    busy, mine, other = BusyCoalescer(), call_of("a"), call_of("b", on_error="return")
    joined(busy, mine, other)
    assert group_of(mine) is group_of(other)


def test_texts_and_tokens_share() -> None:
    busy, mine, other = BusyCoalescer(), call_of("a b"), call_of([["c", "d"]])
    joined(busy, mine, other)
    request = sent(busy, group_of(mine))
    assert not request.options.omit_tokens
    busy.end(group_of(mine), SERVICE.embed(request))
    assert [list(taken(call)[0].embedding.tokens) for call in (mine, other)] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("options", [{"states": [b"x" * 32]}, {"return_states": True}])
def test_a_call_with_states_does_not_share(options: dict[str, Any]) -> None:
    assert may_share(planned_job(["a"]), NO_DEADLINE, 0.0)
    assert not may_share(planned_job(["a"], **options), NO_DEADLINE, 0.0)


@pytest.mark.parametrize(
    ("sentences", "info", "expected"),
    [
        (["a"] * 64, INFO, True),
        (["a"] * 65, INFO, False),
        ([["a"] * 2048], INFO, True),
        ([["a"] * 2049], INFO, False),
        (["a"] * 5, replace(INFO, limits=replace(INFO.limits, max_sentences_per_request=4)), False),
        ([["a"] * 5], replace(INFO, limits=replace(INFO.limits, max_tokens_per_request=4)), False),
        ([["a"] * 9], replace(INFO, limits=replace(INFO.limits, max_response_bytes=5000)), False),
    ],
)
def test_a_large_call_does_not_share(sentences: Any, info: Any, expected: bool) -> None:
    assert may_share(planned_job(sentences, info), NO_DEADLINE, 0.0) is expected


def test_a_call_without_the_time_to_wait_does_not_share() -> None:
    assert may_share(planned_job("a"), Deadline(1.0), 0.9)
    assert not may_share(planned_job("a"), Deadline(1.0), 1.0)


@pytest.mark.parametrize("sentence", ["a", ["a"] * 32])
def test_a_full_group_is_due_at_once(sentence: Any) -> None:
    busy = BusyCoalescer()
    calls = [call_of([sentence]) for _ in range(64)]
    assert joined(busy, *calls[:-1]) == []
    assert joined(busy, calls[-1]) == [group_of(calls[0])]
    assert calls[0].sends_at_s == -math.inf
    assert group_of(calls[-1]) is group_of(calls[0])


def test_a_call_that_does_not_fit_begins_another_group() -> None:
    busy, small, large = BusyCoalescer(), call_of([["a"] * 100]), call_of([["a"] * 2000])
    assert joined(busy, small, large) == [group_of(small)]
    assert large.sends_at_s == WAIT_S
    assert group_of(large) is not group_of(small)


@pytest.mark.parametrize(("others", "expected"), [([3.0, 9.0, 5.0], 9.0), ([3.0, math.inf], math.inf)])
def test_the_request_has_the_latest_deadline(others: list[float], expected: float) -> None:
    busy = BusyCoalescer()
    calls = [call_of("a", Deadline(at_s)) for at_s in others]
    joined(busy, *calls)
    assert group_of(calls[0]).deadline.at_s == expected


def test_a_call_that_left_before_the_request_is_not_in_it() -> None:
    busy = BusyCoalescer()
    calls = [call_of(each, Deadline(at_s)) for each, at_s in (("a", 9.0), ("b", 5.0), ("c", 4.0))]
    joined(busy, *calls)
    busy.leave(calls[0])
    assert (calls[0].sends_at_s, calls[1].sends_at_s) == (math.inf, WAIT_S)
    group = group_of(calls[1])
    assert (group.cost.sentences, group.deadline.at_s) == (2, 5.0)
    assert texts_of(sent(busy, group)) == ["b", "c"]


def test_the_results_of_a_call_that_left_are_dropped() -> None:
    busy = BusyCoalescer()
    calls = [call_of("a"), call_of("b"), call_of("c")]
    joined(busy, *calls)
    group = group_of(calls[0])
    request = sent(busy, group)
    busy.leave(calls[1])
    assert not group.ended
    busy.end(group, SERVICE.embed(request))
    assert [tuple(taken(call)[0].embedding.tokens) for call in (calls[0], calls[2])] == [("a",), ("c",)]
    assert calls[1].outcome is None


def test_a_group_without_calls_is_not_sent() -> None:
    busy, mine, late = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, mine)
    group = group_of(mine)
    busy.leave(mine)
    busy.leave(mine)
    assert not busy.take(group)
    joined(busy, late)
    assert group_of(late) is not group


def test_a_request_that_no_call_waits_for_has_ended() -> None:
    busy, mine, other = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, mine, other)
    sent(busy, group_of(mine))
    busy.leave(mine)
    assert not group_of(mine).ended
    busy.leave(other)
    assert group_of(mine).ended


def test_a_group_whose_sending_was_interrupted_is_due_again_and_closed() -> None:
    busy, mine, late = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, mine)
    sent(busy, group_of(mine))
    busy.give_back(group_of(mine))
    assert mine.sends_at_s == -math.inf
    joined(busy, late)
    assert group_of(late) is not group_of(mine)
    assert texts_of(sent(busy, group_of(mine))) == ["a"]


def test_a_group_that_is_given_back_has_no_calls_that_left_meanwhile() -> None:
    busy, mine, other = BusyCoalescer(), call_of("a"), call_of("b")
    joined(busy, mine, other)
    sent(busy, group_of(mine))
    busy.leave(mine)
    busy.give_back(group_of(other))
    assert other.sends_at_s == -math.inf
    assert texts_of(sent(busy, group_of(other))) == ["b"]


def test_closing_ends_what_was_not_sent() -> None:
    busy, mine, other = BusyCoalescer({}, {"pool": "max"}), call_of("a"), call_of("b", pool="max")
    joined(busy, mine, other)
    busy.close(ClientClosedError("closed"))
    for call in (mine, other):
        assert not busy.take(group_of(call))
        with pytest.raises(ClientClosedError):
            call.take()
    assert not any(call.ended for call in busy.under_way)
    assert joined(busy, call_of("c")) == []  # as much is under way as before


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 70), st.integers(0, 90), st.sampled_from(["mean", "max"])),
        st.tuples(st.sampled_from(["take", "end", "fail", "leave"]), st.integers(0, 100)),
    ),
    max_size=40,
)


@given(STEPS)
def test_whatever_happens_each_call_ends_once_and_requests_are_within_their_limits(steps: list[Any]) -> None:
    coalescer = Coalescer(WAIT_S)
    calls: list[SharedCall] = []
    under_way: list[CallGroup] = []
    left: set[int] = set()
    for step in [*steps, *[("take", 0), ("end", 0)] * len(steps)]:
        groups = {id(call.group): group_of(call) for call in calls}.values()
        unsent = [group for group in groups if group.calls and not group.sent]
        match step:
            case ("join", count, tokens, pool):
                call = call_of([[f"w{len(calls)}"] * tokens] * count, pool=pool)
                if may_share(call.job, NO_DEADLINE, 0.0):
                    calls.append(call)
                    coalescer.join([call], 0.0)
            case ("take", number) if unsent and coalescer.take(group := unsent[number % len(unsent)]):
                request = group.request()
                assert 1 <= len(request.sentences) <= 64
                assert sum(len(sentence.tokens.tokens) for sentence in request.sentences) <= 2048
                under_way.append(group)
            case ("end" | "fail", number) if under_way:
                group = under_way.pop(number % len(under_way))
                overloaded = errors.OverloadedError("busy", code=EXHAUSTED)
                results = [pb.EmbedResult()] * group.cost.sentences
                coalescer.end(group, overloaded if step[0] == "fail" else pb.EmbedResponse(results=results))
            case ("leave", number) if calls and not calls[number % len(calls)].ended:
                coalescer.leave(calls[number % len(calls)])
                left.add(number % len(calls))
    for number, call in enumerate(calls):
        assert call.ended
        assert isinstance(call.waiter, CountedWaiter)
        assert call.waiter.count == (number not in left)
        if isinstance(call.outcome, SharedResults):
            assert len(call.outcome.results) == len(call.job.inputs)
    for pool in ("mean", "max"):  # nothing is counted as under way any more
        assert coalescer.join([call_of("a", pool=pool)], 0.0)
