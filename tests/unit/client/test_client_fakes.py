"""The fakes: the same surface, and vectors that behave."""

import inspect
from typing import Any

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import AsyncClient, Client, ClientClosedError, HealthStatus, ScalarMix, SentenceError
from bilm_client.errors import ModelNotFoundError, ModelVersionError
from bilm_client.testing import FakeAsyncClient, FakeClient, FakeModel
from bilm_client.testing.service import FakeService, FakeStream


def surface(kind: type) -> dict[str, list[inspect.Parameter]]:
    methods = {name: value for name, value in inspect.getmembers(kind, callable) if not name.startswith("_")}
    return {name: list(inspect.signature(value).parameters.values()) for name, value in methods.items()}


def test_all_clients_have_one_surface() -> None:
    expected = surface(Client)
    assert set(expected) == {"close", "embed", "embed_stream", "health", "list_models", "model_info"}
    assert surface(FakeClient) == expected
    for kind in (AsyncClient, FakeAsyncClient):
        found = surface(kind)
        assert found.keys() == expected.keys()
        for name, parameters in found.items():
            for parameter, other in zip(parameters, expected[name], strict=True):
                # an input may be asynchronous too: the one difference
                differs = (name, parameter.name) == ("embed_stream", "sentences")
                assert parameter.replace(annotation=None) == other.replace(annotation=None)
                assert differs or parameter.annotation == other.annotation
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters
    assert inspect.signature(FakeClient).parameters == inspect.signature(FakeAsyncClient).parameters


OUTPUT = {
    "layers": "all",
    "pool": "none",
    "dtype": "float32",
    "mix": None,
    "l2_normalize": False,
    "on_error": "raise",
    "priority": "interactive",
}
STREAM = {
    **OUTPUT,
    "return_states": False,
    "carry_state": False,
    "initial_state": None,
    "return_state_every": 16,
    "window": 64,
    "window_tokens": 16_384,
    "timeout_s": None,
}


@pytest.mark.parametrize(
    ("method", "expected"),
    [("embed", {**OUTPUT, "states": None, "return_states": False, "timeout_s": None}), ("embed_stream", STREAM)],
)
def test_keywords_are_shown_with_their_defaults(method: str, expected: dict[str, object]) -> None:
    shown = [each for each in surface(Client)[method] if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert {each.name: each.default for each in shown} == expected
    with FakeClient() as client, pytest.raises(TypeError, match=rf"{method}\(\) got an unexpected keyword .* 'layer'"):
        getattr(client, method)(["a"], layer="top")


def test_vectors_depend_on_context_but_for_the_token_layer() -> None:
    with FakeClient() as client:
        river, money, again = client.embed([["river", "bank"], ["money", "bank"], ["river", "bank"]])
    np.testing.assert_array_equal(river.vectors, again.vectors)
    np.testing.assert_array_equal(river.vectors[0, 1], money.vectors[0, 1])
    assert (river.vectors[1:, 1] != money.vectors[1:, 1]).any(axis=-1).all()
    assert river.vectors[0, 0, :2].tolist() == [-0.22308349609375, -0.5302734375]


def test_shapes_pooling_and_mix() -> None:
    with FakeClient(layer_count=2, width=5) as client:
        [every] = client.embed("a b c")
        [top] = client.embed("a b c", layers="top")
        [mean] = client.embed("a b c", pool="mean")
        [average] = client.embed("a b c", layers="average")
        [mix] = client.embed("a b c", layers="mix", mix=ScalarMix([0.0, 0.0], gamma=2.0))
        [unit] = client.embed("a b c", layers="top", pool="max", l2_normalize=True)
    assert every.vectors.shape == (2, 3, 5)
    np.testing.assert_array_equal(top.vectors, every.vectors[-1])
    np.testing.assert_allclose(mean.vectors, every.vectors.mean(1), rtol=1e-6)
    np.testing.assert_allclose(mix.vectors, 2 * average.vectors, rtol=1e-5, atol=1e-7)
    assert np.linalg.norm(unit.vectors) == pytest.approx(1.0)


def test_offsets_and_truncation() -> None:
    with FakeClient() as client:
        [result] = client.embed(" é x" + "y" * 48)
    assert result.offsets == ((1, 3), (4, 53))
    assert result.truncated


def test_failures_in_both_ways_of_input() -> None:
    with FakeClient(failures={"a b": "SENTENCE_TOO_LONG"}) as client:
        results = client.embed(["a b", ["a", "b"], "fine"], on_error="return")
        assert [isinstance(result, SentenceError) for result in results] == [True, True, False]
        with pytest.raises(SentenceError):
            client.embed("a b")
        with pytest.raises(SentenceError, match="POOLING_EMPTY"):
            client.embed([[]], pool="mean")


def test_states_carry_the_context() -> None:
    with FakeClient() as client:
        first, second = client.embed_stream([["a"], ["b"]], carry_state=True, return_state_every=1)
        [alone] = client.embed([["b"]])
        [after] = client.embed([["b"]], states=[first.state])
        assert (after.vectors != alone.vectors).any()
        np.testing.assert_array_equal(after.vectors, second.vectors)
        with pytest.raises(SentenceError, match="STATE_INVALID"):
            client.embed(["b"], states=[b"else"])


MODELS = (FakeModel("en"), FakeModel("nl", layer_count=2), FakeModel("de", width=8, version="2026-11"))


def test_several_models_have_shapes_versions_and_vectors_of_their_own() -> None:
    with FakeClient(models=MODELS) as client:
        [english] = client.embed("a b")
        assert [info.name for info in client.list_models()] == ["en", "de", "nl"]
    with FakeClient(models=MODELS, model="nl") as client:
        [dutch] = client.embed("a b")
        assert client.model_info().name == "nl"
    with FakeClient(models=MODELS, model="de", expected_model_version="2026-11") as client:
        [german] = client.embed("a b")
        [streamed] = client.embed_stream(["a b"])
    np.testing.assert_array_equal(streamed.vectors, german.vectors)
    assert (english.vectors.shape, dutch.vectors.shape, german.vectors.shape) == ((3, 2, 16), (2, 2, 16), (3, 2, 8))
    assert (english.model_version, dutch.model_version, german.model_version) == ("en-1", "nl-1", "2026-11")
    assert (english.vectors[0] != dutch.vectors[0]).all()


def test_a_state_is_of_one_model() -> None:
    with FakeClient(models=MODELS) as english, FakeClient(models=MODELS, model="nl") as dutch:
        [first] = english.embed("a", return_states=True)
        english.embed("b", states=[first.state])
        with pytest.raises(SentenceError, match="STATE_INVALID"):
            dutch.embed("b", states=[first.state])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "fr"}, ModelNotFoundError, r"MODEL_NOT_FOUND\): .*expected one of de, en, nl"),
        ({"expected_model_version": "en-2"}, ModelVersionError, r"MODEL_VERSION_MISMATCH\): .*en served here is en-1"),
    ],
)
async def test_a_model_that_is_not_served(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with FakeClient(models=MODELS, **arguments) as client:
        for call in (client.model_info, lambda: client.embed("a"), lambda: next(client.embed_stream(["a"]))):
            with pytest.raises(error, match=message):
                call()
        assert len(client.list_models()) == 3
    async with FakeAsyncClient(models=MODELS, **arguments) as other:
        with pytest.raises(error, match=message):
            await anext(other.embed_stream(["a", "b"]))
        assert len(await other.list_models()) == 3


def test_models_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"each of another name, got \['en', 'en'\]"):
        FakeClient(models=[FakeModel("en"), FakeModel("en", width=8)])


def test_health_of_models() -> None:
    with FakeClient(models=MODELS) as client:
        assert client.health("model:de") is HealthStatus.SERVING
        assert client.health("model:fr") is HealthStatus.SERVICE_UNKNOWN


def test_health_and_closing() -> None:
    client = FakeClient(health=HealthStatus.NOT_SERVING)
    assert client.health() is HealthStatus.NOT_SERVING
    client.close()
    with pytest.raises(ClientClosedError):
        client.embed("a")


def test_closing_ends_a_stream() -> None:
    client = FakeClient()
    results = client.embed_stream(["a", "b"])
    next(results)
    client.close()
    with pytest.raises(ClientClosedError):
        next(results)


async def test_the_asynchronous_fake() -> None:
    async with FakeAsyncClient(failures={"bad": "TOKEN_EMPTY"}) as client:
        [result] = await client.embed("a b")
        streamed = [one async for one in client.embed_stream(["a b", "bad"], on_error="return")]
    assert isinstance(streamed[0], type(result))
    assert isinstance(streamed[1], SentenceError)


def test_options_that_are_not_set_mean_what_they_mean_to_a_server() -> None:
    service, sentence = FakeService(), pb.Sentence(tokens=pb.Tokens(tokens=["a", "b"]))
    explicit = pb.EmbedOptions(layers=pb.LAYERS_ALL, pooling=pb.POOLING_NONE, data_type=pb.DATA_TYPE_FLOAT32)
    expected = service.embed_sentence(sentence, explicit)
    assert service.embed_sentence(sentence, pb.EmbedOptions()) == expected
    (result,) = service.embed(pb.EmbedRequest(sentences=[sentence])).results
    assert result == expected
    item = pb.StreamItem(id=1, sentence=sentence)
    assert FakeStream(service, pb.StreamStart()).answer(item) == FakeStream(
        service, pb.StreamStart(options=explicit)
    ).answer(item)
    empty = service.embed_sentence(pb.Sentence(tokens=pb.Tokens()), pb.EmbedOptions())
    assert list(empty.embedding.tensor.shape) == [3, 0, 16]
