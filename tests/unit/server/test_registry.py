"""Models by name: what calls find, and until when they keep it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from bilm_api.constants import Reason
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.registry import Registry
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Sentence
from bilm_server.observability.call_record import CallRecord

from tests.support.embedders import embedding, entered
from tests.support.fake_engine import FakeEngine, fake_model


@pytest.fixture
async def embedders() -> AsyncIterator[list[Embedder]]:
    engines: list[FakeEngine[Sentence]] = [FakeEngine(), FakeEngine()]
    models = [replace(fake_model(engine), name=name) for name, engine in zip("ab", engines, strict=True)]
    async with embedding(engines[0], model=models[0]) as a, embedding(engines[1], model=models[1]) as b:
        yield [a, b]


def registry_of(embedders: list[Embedder]) -> Registry:
    return Registry(embedders[0].limits, embedders[0].conversions, embedders)


def new_record() -> CallRecord:
    return CallRecord("Embed", "a peer")


def test_a_call_finds_its_model_and_is_one_of_it(embedders: list[Embedder]) -> None:
    registry = registry_of(embedders)
    for name, expected in (("", "a"), ("a", "a"), ("b", "b")):
        with entered(call := new_record()):
            assert registry.find(name, "").model.name == expected
            assert registry.find(name, embedders[0].model.version).model.name == expected
        assert call.model == expected
        call.held.close()


@pytest.mark.parametrize(
    ("name", "version", "reason", "model"),
    [("other", "", Reason.MODEL_NOT_FOUND, ""), ("b", "other", Reason.MODEL_VERSION_MISMATCH, "b")],
)
def test_what_is_not_served_is_refused(
    embedders: list[Embedder], name: str, version: str, reason: Reason, model: str
) -> None:
    registry = registry_of(embedders)
    with entered(call := new_record()), pytest.raises(RefusalError) as error:
        registry.find(name, version)
    assert (error.value.reason, call.model) == (reason, model)
    assert not registry.has(name, version)
    assert registry.has("b", "")
    assert registry.has("", embedders[0].model.version)


async def test_a_call_keeps_what_it_found_until_its_end(embedders: list[Embedder]) -> None:
    registry, (a, b) = registry_of(embedders), embedders
    with entered(call := new_record()):
        assert registry.find("", "") is a
    registry.replace([b])
    assert registry.default is b
    assert not registry.has("a", "")
    waiting = asyncio.create_task(a.given_back())
    await asyncio.sleep(0)
    assert not waiting.done()
    call.held.close()
    await asyncio.wait_for(waiting, 60)
    with entered(late := new_record()):
        registry.find("b", "")
    late.held.close()
    await asyncio.wait_for(b.given_back(), 60)


async def test_a_call_that_is_over_before_it_finds_its_model_holds_nothing(embedders: list[Embedder]) -> None:
    registry, (a, _) = registry_of(embedders), embedders
    with entered(call := new_record()):
        call.held.close()
        registry.find("", "")
    await asyncio.wait_for(a.given_back(), 60)
