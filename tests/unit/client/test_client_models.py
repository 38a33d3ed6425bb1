"""Clients of a server with several models, on a real socket."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from bilm_client import SentenceError
from bilm_client.errors import ModelNotFoundError, ServiceError
from bilm_client.testing import FakeModel

from tests.support.scripted import Scripted
from tests.unit.client.conftest import Connect

MODELS = (FakeModel("en"), FakeModel("nl", layer_count=2), FakeModel("de", width=8))


@pytest.fixture
def several(scripted: Scripted) -> Scripted:
    scripted.service.serve(*MODELS)
    return scripted


def test_all_models_are_listed_the_default_one_first(several: Scripted, connect: Connect) -> None:
    for client in (connect(), connect(model="nl"), connect(model="nobody")):
        found = client.list_models()
        assert isinstance(found, tuple)
        assert [(info.name, info.version, info.layer_count, info.width) for info in found] == [
            ("en", "en-1", 3, 16),
            ("de", "de-1", 3, 8),
            ("nl", "nl-1", 2, 16),
        ]


def test_each_client_has_the_model_that_it_names(several: Scripted, connect: Connect) -> None:
    """Large calls are cut into several requests, streams and states go the same way."""
    for model in MODELS:
        client = connect(model=model.name)
        assert client.model_info().name == model.name
        results = client.embed([["a", "b"]] * 1500)
        assert {result.model_version for result in results} == {model.version}
        assert {result.vectors.shape for result in results} == {(model.layer_count, 2, model.width)}
        assert {request.model for request in several.service.embed_requests} == {model.name}
        several.service.embed_requests.clear()
        [streamed] = client.embed_stream([["a", "b"]])
        assert (streamed.vectors == results[0].vectors).all()
    assert [stream[0].start.model for stream in several.service.streams] == ["en", "nl", "de"]


def test_a_state_of_another_model_is_refused(several: Scripted, connect: Connect) -> None:
    [first] = connect().embed("a", return_states=True)
    with pytest.raises(SentenceError, match="STATE_INVALID"):
        connect(model="nl").embed("b", states=[first.state])


def test_an_unknown_model(several: Scripted, connect: Connect) -> None:
    client = connect(model="fr")
    calls: list[Callable[[], Any]] = [
        client.model_info,
        lambda: client.embed("a"),
        lambda: next(client.embed_stream(["a"])),
    ]
    for call in calls:
        with pytest.raises(ModelNotFoundError, match="expected one of de, en, nl") as error:
            call()
        assert error.value.reason == "MODEL_NOT_FOUND"
    assert several.service.embed_requests == []


def test_a_model_that_is_removed_meanwhile(several: Scripted, connect: Connect) -> None:
    client = connect(model="nl")
    client.embed("a")
    several.service.serve(*MODELS[:1])
    with pytest.raises(ModelNotFoundError):
        client.embed("a")
    several.service.serve(*MODELS)
    client.embed("a")


def test_listing_fails_as_other_calls_do(several: Scripted, connect: Connect) -> None:
    client = connect(timeout_s=1e-6)
    with pytest.raises(ServiceError) as error:
        client.list_models()
    assert error.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    client.close()
    with pytest.raises(Exception, match="closed"):
        client.list_models()
