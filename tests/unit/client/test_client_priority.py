"""Batch calls say so where the server knows priorities, and are as all others where it doesn't."""

import logging
from typing import Any

import pytest
from bilm_api.v1 import embed_pb2 as pb

from tests.support.scripted import Scripted
from tests.unit.client.conftest import Connect

STATED = {"interactive": pb.PRIORITY_UNSPECIFIED, "batch": pb.PRIORITY_BATCH}


@pytest.mark.parametrize("priority", STATED)
def test_calls_and_streams_state_their_priority(connect: Connect, scripted: Scripted, priority: str) -> None:
    client = connect()
    assert len(client.embed(["a", "b c"], priority=priority)) == 2
    assert len(list(client.embed_stream(["a", "b c"], priority=priority))) == 2
    assert scripted.service.embed_requests[0].priority == STATED[priority]
    assert scripted.service.streams[0][0].start.priority == STATED[priority]


def test_without_a_priority_nothing_is_stated_or_asked_for(connect: Connect, scripted: Scripted) -> None:
    client = connect()
    assert list(client.embed_stream(["a"]))
    assert scripted.service.get_model_count == 0
    client.embed("a")
    assert scripted.service.embed_requests[0].priority == pb.PRIORITY_UNSPECIFIED
    assert scripted.service.streams[0][0].start.priority == pb.PRIORITY_UNSPECIFIED


def test_a_server_without_the_feature_is_sent_none_which_is_logged_once(
    connect: Connect, scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    scripted.service.model.ClearField("features")
    client = connect()
    for _ in range(2):
        assert client.embed("a", priority="batch")
        assert list(client.embed_stream(["a"], priority="batch"))
    assert {request.priority for request in scripted.service.embed_requests} == {pb.PRIORITY_UNSPECIFIED}
    assert {stream[0].start.priority for stream in scripted.service.streams} == {pb.PRIORITY_UNSPECIFIED}
    (record,) = caplog.records
    assert record.getMessage().startswith("priority: the server doesn't know it")


def test_a_stream_states_its_priority_again_when_it_is_resumed(connect: Connect, scripted: Scripted) -> None:
    scripted.service.stream_acts.append(scripted.service.answer_then_fail(1))
    assert len(list(connect().embed_stream(["a", "b", "c"], priority="batch"))) == 3
    assert [stream[0].start.priority for stream in scripted.service.streams] == [pb.PRIORITY_BATCH] * 2


def test_what_goes_by_stream_has_the_priority_of_its_call(connect: Connect, scripted: Scripted) -> None:
    scripted.service.model.limits.max_tokens_per_request = 4
    assert len(connect().embed([["a"] * 9], priority="batch")) == 1
    assert scripted.service.streams[0][0].start.priority == pb.PRIORITY_BATCH


def test_a_stream_that_is_left_early_ends(connect: Connect, scripted: Scripted) -> None:
    results = connect().embed_stream(["a", "b", "c"], priority="batch", window=1)
    next(results)
    results.close()
    assert len(scripted.service.streams) == 1


@pytest.mark.parametrize("priority", ["low", 2, None])
def test_another_priority_is_refused(connect: Connect, priority: Any) -> None:
    with pytest.raises(ValueError, match="priority must be one of 'interactive', 'batch', got "):
        connect().embed("a", priority=priority)
