"""Arguments that can't be are told before anything is sent, by name."""

import math
from typing import Any

import grpc
import pytest
from bilm_client import Client, Keepalive, RetryPolicy, ScalarMix
from bilm_client._core.settings import Settings
from bilm_client.testing import FakeClient

MIX = ScalarMix([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("sentences", "options", "error", "message"),
    [
        ("a", {"layers": "last"}, ValueError, "layers must be one of 'all', 'top', 'average', 'mix', got 'last'"),
        ("a", {"pool": "sum"}, ValueError, "pool must be one of"),
        ("a", {"dtype": "float64"}, ValueError, "dtype must be one of"),
        ("a", {"on_error": "ignore"}, ValueError, "on_error must be one of"),
        ("a", {"layers": "mix"}, ValueError, "mix must be given with layers='mix' and only then, got none"),
        ("a", {"mix": MIX}, ValueError, "mix must be given with layers='mix' and only then, got one"),
        ("a", {"layers": "mix", "mix": [1, 2, 3]}, TypeError, "mix must be a ScalarMix, got list"),
        ("a", {"l2_normalize": 1}, TypeError, "l2_normalize must be a bool"),
        ("a", {"return_states": "yes"}, TypeError, "return_states must be a bool"),
        ("a", {"timeout_s": 0}, ValueError, "timeout_s must be positive"),
        ("a", {"timeout_s": "1"}, TypeError, "timeout_s must be a number"),
        (["a", "b"], {"states": [b""]}, ValueError, "states must have one entry for each of the 2 sentences, got 1"),
        (["a"], {"states": ["x"]}, TypeError, r"states\[0\] must be bytes or None, got str"),
        (["a", ["b", 3]], {}, TypeError, r"sentences\[1\]\[1\] must be a str, got int"),
        (["a", b"b"], {}, TypeError, r"sentences\[1\] must be a str or a list of str, got bytes"),
        (b"a", {}, TypeError, "sentences must be a str or a list of sentences, got bytes"),
        (7, {}, TypeError, "sentences must be a str or a list of sentences, got int"),
        (["ok", "lone \ud800"], {}, ValueError, r"sentences\[1\] must be text that UTF-8 can hold"),
        ([["ok", "lone \udfff"]], {}, ValueError, r"sentences\[0\]\[1\] must be text that UTF-8 can hold"),
    ],
)
def test_embed(sentences: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with FakeClient() as client, pytest.raises(error, match=message):
        client.embed(sentences, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 1.5}, TypeError, "window must be an int"),
        ({"return_state_every": 0}, ValueError, "return_state_every must be at least 1"),
        ({"initial_state": b"x"}, ValueError, "initial_state must be given with carry_state=True only"),
        ({"carry_state": 1}, TypeError, "carry_state must be a bool"),
        ({"layers": None}, ValueError, "layers must be one of"),
    ],
)
def test_embed_stream_tells_at_the_call(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with FakeClient() as client, pytest.raises(error, match=message):
        client.embed_stream(["a"], **options)


def test_arguments_that_only_look_equal_are_checked_apart() -> None:
    with FakeClient() as client:
        client.embed("a", l2_normalize=True)
        with pytest.raises(TypeError, match="l2_normalize must be a bool, got 1"):
            client.embed("a", l2_normalize=1)  # type: ignore[call-overload]


def test_embed_stream_takes_no_lone_str() -> None:
    with FakeClient() as client, pytest.raises(TypeError, match="must be an iterable of sentences, got one str"):
        client.embed_stream("letters")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": ""}, ValueError, "target must be an address"),
        ({"target": 50051}, TypeError, "target must be a str"),
        ({"model": None}, TypeError, "model must be a str"),
        ({"timeout_s": -1.0}, ValueError, "timeout_s must be positive"),
        ({"timeout_s": math.nan}, ValueError, "timeout_s must be positive"),
        ({"token": "line\nbreak"}, ValueError, "token must be printable ASCII"),
    ],
)
def test_client(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Client(**{"target": "localhost:1", **arguments})


@pytest.mark.parametrize(("weights", "gamma"), [([], 1.0), ([math.nan], 1.0), ([1.0], math.inf)])
def test_scalar_mix(weights: list[float], gamma: float) -> None:
    with pytest.raises(ValueError, match="weights"):
        ScalarMix(weights, gamma)


def test_a_token_never_shows() -> None:
    assert "secret" not in repr(_settings(token="secret"))


def test_the_callers_channel_options_have_the_last_word() -> None:
    arguments = _settings(channel_options=[("grpc.enable_retries", 0), ("grpc.x", "y")]).channel_arguments()
    assert dict(arguments)["grpc.enable_retries"] == 0
    assert dict(arguments)["grpc.x"] == "y"
    assert len(arguments) == len(dict(arguments))
    assert dict(arguments)["grpc.per_rpc_retry_buffer_size"] > 4 * 1024 * 1024


def _settings(**arguments: Any) -> Settings:
    defaults: dict[str, Any] = {
        "target": "localhost:1",
        "model": "",
        "expected_model_version": "",
        "timeout_s": 1.0,
        "retry": RetryPolicy(),
        "keepalive": Keepalive(),
        "credentials": grpc.ssl_channel_credentials(),
        "token": None,
        "metadata": (),
        "channel_options": (),
        "proxy": True,
    }
    return Settings(**{**defaults, **arguments})
